-- The head of each model's queue; of these the one that has waited beyond the age bound, else a warm model's,
-- else by priority and arrival.
SELECT r.seq FROM json_each(:models) AS m
JOIN requests AS r ON r.seq = (
  SELECT q.seq FROM requests AS q
  WHERE q.model = m.value AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL
  ORDER BY q.priority DESC, q.seq LIMIT 1)
ORDER BY CASE WHEN r.created_at <= :old THEN 0 WHEN r.model IN (SELECT value FROM json_each(:warm)) THEN 1 ELSE 2 END,
  r.priority DESC, r.seq
LIMIT 1
