-- A lost or released attempt: back to its place in the queue; lost input files: to be fetched again.
UPDATE requests
SET inputs = CASE inputs WHEN 'fetching' THEN 'pending' ELSE inputs END,
    attempt = attempt - CASE WHEN state = 'running' THEN :uncount ELSE 0 END,
    state = 'queued', worker = NULL, progress = NULL
WHERE id = :id AND fence = :fence AND worker IS NOT NULL
