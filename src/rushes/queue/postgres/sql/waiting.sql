SELECT r.* FROM (SELECT DISTINCT unnest($1::text[]) AS name) AS m CROSS JOIN LATERAL (
  SELECT * FROM requests AS q
  WHERE q.model = m.name AND q.state || '/' || q.inputs = 'queued/ready' AND q.remote_task IS NULL
  ORDER BY q.priority DESC, q.seq LIMIT $2) AS r
ORDER BY r.priority DESC, r.seq LIMIT $2
