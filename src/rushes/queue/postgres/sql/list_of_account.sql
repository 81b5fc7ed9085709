SELECT * FROM requests
WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR model = $2) AND seq < $3::bigint
  AND account = $5
ORDER BY seq DESC LIMIT $4
