WITH held AS MATERIALIZED (
  SELECT r.seq FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS m (id, fence, beat)
  JOIN requests AS r ON r.id = m.id
  WHERE r.fence = m.fence AND r.beat = m.beat AND r.worker IS NOT NULL
  ORDER BY r.seq FOR UPDATE OF r
)
SELECT id, state FROM end_leases(ARRAY(SELECT seq FROM held), true, $4, $5)
