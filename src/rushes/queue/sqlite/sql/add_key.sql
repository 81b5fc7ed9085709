INSERT INTO keys (id, account, name, hash, hint, created_at, revoked_at)
VALUES (:id, :account, :name, :hash, :hint, :created_at, :revoked_at)
