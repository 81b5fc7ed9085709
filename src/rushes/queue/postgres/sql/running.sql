SELECT model, started_at, progress FROM requests
WHERE worker IS NOT NULL AND worker = ANY ($1::text[]) AND state = 'running' AND remote_task IS NULL
ORDER BY seq
