SELECT count(*) FROM (SELECT 1 FROM requests WHERE state = 'queued' AND key_id = :key_id LIMIT :limit)
