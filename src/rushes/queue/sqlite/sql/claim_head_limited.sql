-- As claim_head, without the accounts that have as many running requests as they may: the head of a model's
-- queue is the best of the heads of each account's part of it. The recursion steps from account to account
-- through the index.
WITH RECURSIVE lanes (model, account) AS (
  SELECT m.value, (SELECT min(q.account) FROM requests AS q
                   WHERE q.model = m.value AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL)
  FROM json_each(:models) AS m
  UNION ALL
  SELECT model, (SELECT min(q.account) FROM requests AS q
                 WHERE q.model = lanes.model AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL
                   AND q.account > lanes.account)
  FROM lanes WHERE account IS NOT NULL
),
heads AS (
  SELECT r.seq, r.model, r.priority, r.created_at,
    row_number() OVER (PARTITION BY r.model ORDER BY r.priority DESC, r.seq) AS place
  FROM lanes
  JOIN requests AS r ON r.seq = (
    SELECT q.seq FROM requests AS q
    WHERE q.model = lanes.model AND q.account = lanes.account
      AND q.state = 'queued' AND q.inputs = 'ready' AND q.remote_task IS NULL
    ORDER BY q.priority DESC, q.seq LIMIT 1)
  WHERE lanes.account IS NOT NULL
    AND (SELECT count(*) FROM requests AS b WHERE b.state = 'running' AND b.account = lanes.account)
        < :account_limit
)
SELECT seq FROM heads WHERE place = 1
ORDER BY CASE WHEN created_at <= :old THEN 0 WHEN model IN (SELECT value FROM json_each(:warm)) THEN 1 ELSE 2 END,
  priority DESC, seq
LIMIT 1
