WITH taken AS MATERIALIZED (
  SELECT seq FROM requests WHERE state || '/' || inputs = 'queued/pending' AND model = ANY ($2::text[])
  ORDER BY seq LIMIT $3 FOR UPDATE SKIP LOCKED
)
UPDATE requests AS r SET inputs = 'fetching', fence = r.fence + 1, worker = $1
FROM taken WHERE r.seq = taken.seq
RETURNING r.*
