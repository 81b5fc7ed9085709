-- The head of each model's queue; of these the one that has waited beyond the age bound, else the warm
-- model's, else by priority and arrival.
SELECT r.seq FROM json_each(:models) AS m
JOIN requests AS r ON r.seq = (
  SELECT q.seq FROM requests AS q
  WHERE q.model = m.value AND q.state = 'queued' AND q.inputs = 'ready'
  ORDER BY q.priority DESC, q.seq LIMIT 1)
ORDER BY CASE WHEN r.created_at <= :old THEN 0 WHEN r.model = :warm THEN 1 ELSE 2 END,
  r.priority DESC, r.seq
LIMIT 1
