SELECT FROM requests
WHERE id = $1 AND fence = $2 AND finished_at IS NOT NULL
  AND outputs IS NOT DISTINCT FROM $3::bytea AND failure IS NOT DISTINCT FROM $4::bytea
