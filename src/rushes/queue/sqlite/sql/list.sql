SELECT * FROM requests
WHERE (:account IS NULL OR account = :account)
  AND (:state IS NULL OR state = :state)
  AND (:model IS NULL OR model = :model)
  AND (:before IS NULL OR seq < :before)
ORDER BY seq DESC LIMIT :limit
