-- The first of each key's part of each model's line; the recursion steps from key to key through the index. Where that
-- makes too many, each part gives up its last ones: nobody's first is hidden by another's hundredth. What is looked
-- at is bounded, too.
WITH RECURSIVE steps (model, key_id) AS (
  SELECT m.name, (SELECT min(q.key_id) FROM requests AS q
                  WHERE q.model = m.name AND q.state || ':' || q.inputs = 'queued:ready' AND q.remote_task IS NULL)
  FROM (SELECT DISTINCT unnest($1::text[]) AS name) AS m
  UNION ALL
  SELECT s.model, (SELECT min(q.key_id) FROM requests AS q
                   WHERE q.model = s.model AND q.state || ':' || q.inputs = 'queued:ready' AND q.remote_task IS NULL
                     AND q.key_id > s.key_id)
  FROM steps AS s WHERE s.key_id IS NOT NULL
), parts AS MATERIALIZED (
  SELECT model, key_id FROM steps WHERE key_id IS NOT NULL
), placed AS (
  SELECT h.seq FROM parts AS p CROSS JOIN LATERAL (
    SELECT q.seq, q.priority, row_number() OVER (ORDER BY q.priority DESC, q.seq) AS place FROM requests AS q
    WHERE q.model = p.model AND q.key_id = p.key_id
      AND q.state || ':' || q.inputs = 'queued:ready' AND q.remote_task IS NULL
    ORDER BY q.priority DESC, q.seq
    LIMIT least($2::integer, greatest(1, 10000 / (SELECT greatest(1, count(*)) FROM parts)))) AS h
  ORDER BY h.place, h.priority DESC, h.seq LIMIT 2000
)
SELECT r.* FROM placed JOIN requests AS r USING (seq)
ORDER BY r.priority DESC, r.seq
