SELECT id, account, name, key, content_type, size, created_at FROM files WHERE id = ?
