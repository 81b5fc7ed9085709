UPDATE requests
SET state = 'running', attempt = attempt + 1, fence = fence + 1, worker = :worker, engine = :engine,
    started_at = :now, progress = NULL
WHERE seq = :seq
RETURNING *
