SELECT * FROM keys ORDER BY created_at, id
