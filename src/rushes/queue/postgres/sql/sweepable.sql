SELECT r.* FROM requests AS r
WHERE r.finished_at < $1 AND r.finished_at IS NOT NULL AND r.swept_at IS NULL
  AND NOT EXISTS (
    SELECT FROM requests AS live
    WHERE live.state IN ('queued', 'running') AND live.storage_keys <> '{}'
      AND live.storage_keys && r.storage_keys)
ORDER BY r.finished_at, r.seq LIMIT $2
