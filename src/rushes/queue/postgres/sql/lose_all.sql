WITH held AS MATERIALIZED (
  SELECT seq FROM requests WHERE worker = $1 ORDER BY seq FOR UPDATE
), gone AS (
  DELETE FROM workers WHERE id = $1
)
SELECT id, state FROM end_leases(ARRAY(SELECT seq FROM held), $2, $3, $4)
