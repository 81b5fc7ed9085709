INSERT INTO spending (request, remote, fence, day, key_id, usd)
VALUES (:id, :remote, :fence, :day, :key_id, :usd)
