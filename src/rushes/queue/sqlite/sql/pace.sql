WITH latest AS (
  SELECT model, started_at, finished_at FROM requests INDEXED BY requests_paced
  WHERE state = 'succeeded' AND remote_task IS NULL AND engine <> 'draft'
  ORDER BY finished_at DESC LIMIT 1000
), placed AS (
  SELECT model, max(0.0, finished_at - started_at) AS seconds,
    row_number() OVER (PARTITION BY model ORDER BY finished_at DESC) AS place
  FROM latest WHERE model IN (SELECT value FROM json_each(:models))
)
SELECT model, avg(seconds) FROM placed WHERE place <= 20 GROUP BY model
