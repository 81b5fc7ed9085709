WITH head AS MATERIALIZED (
  SELECT seq FROM requests
  WHERE state || '/remote' = 'queued/remote' AND remote IS NOT NULL AND remote = ANY ($2::text[])
  ORDER BY seq LIMIT 1 FOR UPDATE SKIP LOCKED
)
UPDATE requests AS r
SET state = 'running', attempt = r.attempt + 1, fence = r.fence + 1, worker = $1, engine = r.remote,
    started_at = epoch(), progress = NULL
FROM head WHERE r.seq = head.seq
RETURNING r.*
