-- Outcomes of a group of leases: with outputs succeeded, with a failure failed. Rows are locked in one order,
-- so that groups of several processes cannot deadlock.
WITH held AS MATERIALIZED (
  SELECT r.seq, o.*
  FROM unnest($1::text[], $2::bigint[], $3::bytea[], $4::bytea[], $5::double precision[], $6::text[])
    AS o (id, fence, outputs, failure, cost_usd, storage_keys)
  JOIN requests AS r ON r.id = o.id
  WHERE r.fence = o.fence AND r.state = 'running'
  ORDER BY r.seq FOR UPDATE OF r
)
UPDATE requests AS r
SET state = CASE WHEN held.failure IS NULL THEN 'succeeded' ELSE 'failed' END,
    outputs = held.outputs, failure = held.failure, cost_usd = held.cost_usd,
    storage_keys = ARRAY(SELECT jsonb_array_elements_text(held.storage_keys::jsonb)),
    finished_at = epoch(), worker = NULL
FROM held WHERE r.seq = held.seq
RETURNING r.id
