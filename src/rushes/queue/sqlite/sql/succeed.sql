UPDATE requests
SET state = 'succeeded', outputs = :outputs, cost_usd = :cost_usd, finished_at = :now, worker = NULL
WHERE id = :id AND fence = :fence AND state = 'running'
