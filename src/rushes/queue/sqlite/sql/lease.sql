SELECT state, attempt, beat, remote_task IS NOT NULL FROM requests
WHERE id = :id AND fence = :fence AND worker IS NOT NULL
