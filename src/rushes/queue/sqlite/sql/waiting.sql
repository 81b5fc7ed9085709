-- The best of the heads of the models' lines; only those rows are read that are answered.
SELECT * FROM requests WHERE seq IN (
  SELECT r.seq FROM (SELECT DISTINCT value AS model FROM json_each(:models)) AS m
  JOIN requests AS r ON r.seq IN (
    SELECT q.seq FROM requests AS q
    WHERE q.model = m.model AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL
    ORDER BY q.priority DESC, q.seq LIMIT :limit)
  ORDER BY r.priority DESC, r.seq LIMIT :limit)
ORDER BY priority DESC, seq
