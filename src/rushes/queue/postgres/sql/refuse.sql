UPDATE requests SET state = 'failed', failure = $3, finished_at = epoch(), worker = NULL
WHERE id = $1 AND fence = $2 AND state = 'queued' AND inputs = 'fetching'
RETURNING id
