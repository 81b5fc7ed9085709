UPDATE requests SET state = 'cancelled', finished_at = :now, worker = NULL
WHERE id = :id AND state = 'queued' AND remote_task IS NULL
