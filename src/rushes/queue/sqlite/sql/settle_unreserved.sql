INSERT INTO spending (request, remote, fence, day, key_id, usd, settled)
SELECT id, :remote, fence, :day, key_id, :usd, 1 FROM requests WHERE id = :id AND fence = :fence
ON CONFLICT DO NOTHING
