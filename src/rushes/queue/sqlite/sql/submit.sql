INSERT INTO requests (id, account, key_id, model, priority, inputs, created_at, input, sources, hops)
VALUES (:id, :account, :key_id, :model, :priority, :inputs, :now, :input, :sources, :hops)
