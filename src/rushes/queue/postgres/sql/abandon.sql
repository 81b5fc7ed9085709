UPDATE requests SET state = 'failed', failure = $2, finished_at = epoch()
WHERE id = $1 AND state = 'queued' AND remote_task IS NOT NULL
RETURNING id
