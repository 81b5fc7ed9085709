INSERT INTO keys (id, account, name, hash, hint, created_at, revoked_at) VALUES ($1, $2, $3, $4, $5, $6, $7)
