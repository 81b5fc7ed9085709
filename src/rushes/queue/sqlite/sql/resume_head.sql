SELECT seq, remote FROM requests INDEXED BY requests_resumable
WHERE state = 'queued' AND remote_task IS NOT NULL AND remote IN (SELECT value FROM json_each(:remotes))
ORDER BY seq LIMIT 1
