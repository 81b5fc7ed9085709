-- A request's own files are its outputs and the copies of its inputs. What it names as stored belongs to somebody
-- else: to an upload, or to the request whose output it is.
UPDATE requests SET swept_at = :now
WHERE seq IN (
  SELECT r.seq FROM requests AS r
  WHERE r.finished_at IS NOT NULL AND r.finished_at < :before AND r.swept_at IS NULL
    AND NOT EXISTS (
      SELECT 1 FROM json_each(CAST(coalesce(r.outputs, '[]') AS TEXT)) AS o
      JOIN live_keys AS l ON l.key = json_extract(o.value, '$.key'))
    AND NOT EXISTS (
      SELECT 1 FROM json_each(CAST(r.sources AS TEXT)) AS s
      JOIN live_keys AS l ON l.key = json_extract(s.value, '$.key'))
  ORDER BY r.finished_at, r.seq LIMIT :limit)
RETURNING *
