SELECT seq, key_id, (SELECT count(*) FROM requests AS b WHERE b.state = 'running' AND b.account = r.account)
FROM requests AS r
WHERE id = :id AND state = 'queued' AND inputs = 'ready' AND remote_task IS NULL
