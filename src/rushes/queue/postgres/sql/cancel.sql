WITH cancelled AS (
  UPDATE requests SET state = 'cancelled', finished_at = epoch(), worker = NULL
  WHERE id = $1 AND state = 'queued' AND remote_task IS NULL AND ($2::text IS NULL OR account = $2)
  RETURNING state
)
SELECT state, false AS at_remote FROM cancelled
UNION ALL
SELECT state, remote_task IS NOT NULL FROM requests
WHERE id = $1 AND ($2 IS NULL OR account = $2) AND NOT EXISTS (SELECT FROM cancelled)
