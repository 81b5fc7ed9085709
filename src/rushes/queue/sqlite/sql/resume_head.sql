SELECT seq FROM requests INDEXED BY requests_resumable
WHERE state = 'queued' AND remote_task IS NOT NULL AND remote IN (SELECT value FROM json_each(:remotes))
  AND model IN (SELECT value FROM json_each(:models))
ORDER BY seq LIMIT 1
