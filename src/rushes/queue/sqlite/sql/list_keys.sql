SELECT id, account, name, hash, hint, created_at, revoked_at FROM keys ORDER BY created_at, id
