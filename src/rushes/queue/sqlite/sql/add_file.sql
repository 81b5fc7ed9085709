INSERT INTO files (id, account, name, key, content_type, size, created_at)
VALUES (:id, :account, :name, :key, :content_type, :size, :created_at)
