UPDATE requests SET state = 'failed', failure = :failure, finished_at = :now
WHERE id = :id AND state = 'queued' AND remote_task IS NOT NULL
