SELECT * FROM requests
WHERE finished_at IS NOT NULL AND finished_at < :before AND swept_at IS NULL
ORDER BY finished_at
