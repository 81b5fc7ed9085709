UPDATE requests SET inputs = 'fetching', fence = fence + 1, worker = :worker
WHERE seq IN (
  SELECT p.seq FROM json_each(:models) AS m JOIN requests AS p
    ON p.model = m.value AND p.state = 'queued' AND p.inputs = 'pending'
  ORDER BY p.seq LIMIT :limit)
RETURNING *
