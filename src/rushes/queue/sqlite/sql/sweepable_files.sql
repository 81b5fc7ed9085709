SELECT id, account, name, key, content_type, size, created_at FROM files
WHERE created_at < :before ORDER BY created_at
