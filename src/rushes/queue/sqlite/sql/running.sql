SELECT model, started_at, progress FROM requests INDEXED BY requests_leased
WHERE worker IN (SELECT value FROM json_each(:workers)) AND worker IS NOT NULL
  AND state = 'running' AND remote_task IS NULL
ORDER BY seq
