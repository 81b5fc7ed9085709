SELECT f.* FROM files AS f
WHERE f.created_at < $1
  AND NOT EXISTS (
    SELECT FROM requests AS live
    WHERE live.state IN ('queued', 'running') AND live.storage_keys <> '{}'
      AND live.storage_keys && ARRAY[f.key])
ORDER BY f.created_at, f.id LIMIT $2
