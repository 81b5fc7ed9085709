INSERT INTO files (id, account, name, key, content_type, size, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7)
