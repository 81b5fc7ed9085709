-- A lost or released attempt: back to its place in the queue; lost input files: to be fetched again. What goes on
-- at a remote is the same attempt, whoever waits for it.
UPDATE requests
SET inputs = CASE inputs WHEN 'fetching' THEN 'pending' ELSE inputs END,
    attempt = attempt - (state = 'running' AND (:uncount OR remote_task IS NOT NULL)),
    state = 'queued', worker = NULL, progress = NULL
WHERE id = :id AND fence = :fence AND worker IS NOT NULL
