-- The first of each key's part of each model's line; the recursion steps from key to key through the index. Where that
-- makes too many, each part gives up its last ones: nobody's first is hidden by another's hundredth. What is looked
-- at is bounded, too, and only those rows are read that are answered.
WITH RECURSIVE steps (model, key_id) AS (
  SELECT m.model, (SELECT min(q.key_id) FROM requests AS q INDEXED BY requests_ready_by_key
                   WHERE q.model = m.model AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL)
  FROM (SELECT DISTINCT value AS model FROM json_each(:models)) AS m
  UNION ALL
  SELECT model, (SELECT min(q.key_id) FROM requests AS q INDEXED BY requests_ready_by_key
                 WHERE q.model = steps.model AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL
                   AND q.key_id > steps.key_id)
  FROM steps WHERE key_id IS NOT NULL
),
parts AS MATERIALIZED (SELECT model, key_id FROM steps WHERE key_id IS NOT NULL),
placed AS (
  SELECT r.seq, r.priority,
    row_number() OVER (PARTITION BY r.model, r.key_id ORDER BY r.priority DESC, r.seq) AS place
  FROM parts CROSS JOIN requests AS r ON r.seq IN (
    SELECT q.seq FROM requests AS q INDEXED BY requests_ready_by_key
    WHERE q.model = parts.model AND q.key_id = parts.key_id
      AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL
    ORDER BY q.priority DESC, q.seq
    LIMIT min(:limit, max(1, 10000 / (SELECT max(1, count(*)) FROM parts))))
)
SELECT * FROM requests
WHERE seq IN (SELECT seq FROM placed ORDER BY place, priority DESC, seq LIMIT 2000)
ORDER BY priority DESC, seq
