UPDATE requests SET state = 'failed', failure = :failure, finished_at = :now, worker = NULL
WHERE id = :id AND fence = :fence AND state = 'queued' AND inputs = 'fetching'
