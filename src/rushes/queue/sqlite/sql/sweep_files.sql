DELETE FROM files
WHERE id IN (
  SELECT f.id FROM files AS f
  WHERE f.created_at < :before AND NOT EXISTS (SELECT 1 FROM live_keys AS l WHERE l.key = f.key)
  ORDER BY f.created_at, f.id LIMIT :limit)
RETURNING id, account, name, key, content_type, size, created_at
