SELECT * FROM keys WHERE id = $1 OR name = $1 ORDER BY created_at, id
