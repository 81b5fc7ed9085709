SELECT id, account, name, hash, hint, created_at, revoked_at FROM keys WHERE hash = ?
