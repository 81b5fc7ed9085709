SELECT 1 WHERE EXISTS (SELECT 1 FROM files WHERE created_at < :before)
