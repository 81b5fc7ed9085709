SELECT 1 WHERE EXISTS (SELECT 1 FROM requests
  WHERE finished_at IS NOT NULL AND finished_at < :before AND swept_at IS NULL)
