WITH held AS MATERIALIZED (
  SELECT r.seq, b.progress
  FROM unnest($1::text[], $2::bigint[], $3::bytea[]) AS b (id, fence, progress)
  JOIN requests AS r ON r.id = b.id
  WHERE r.fence = b.fence AND r.worker IS NOT NULL
  ORDER BY r.seq FOR UPDATE OF r
)
UPDATE requests AS r SET beat = r.beat + 1, progress = coalesce(held.progress, r.progress)
FROM held WHERE r.seq = held.seq
RETURNING r.id
