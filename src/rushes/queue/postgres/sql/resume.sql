-- The engine is what stands before the separator; while the task was handed over, the one that it was taken for.
WITH head AS MATERIALIZED (
  SELECT seq FROM requests
  WHERE state || '/remote' = 'queued/remote' AND remote IS NOT NULL AND remote = ANY ($2::text[])
    AND model = ANY ($3::text[])
  ORDER BY seq LIMIT 1 FOR UPDATE SKIP LOCKED
)
UPDATE requests AS r
SET state = 'running', attempt = r.attempt + 1, fence = r.fence + 1, worker = $1,
    engine = CASE r.remote WHEN '' THEN r.engine ELSE split_part(r.remote, E'\n', 1) END,
    started_at = epoch(), progress = NULL
FROM head WHERE r.seq = head.seq
RETURNING r.*
