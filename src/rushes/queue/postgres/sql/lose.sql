WITH held AS MATERIALIZED (
  SELECT seq FROM requests WHERE id = $1 AND fence = $2 AND worker IS NOT NULL FOR UPDATE
)
SELECT id, state FROM end_leases(ARRAY(SELECT seq FROM held), $3, $4, $5)
