-- What was reserved when the request was taken, by this lease or by one that it goes on for, or what either settled
-- before; not what an earlier time there did cost. The day stays.
UPDATE spending SET usd = :usd, settled = 1, fence = :fence
WHERE request = :id AND remote = :remote
  AND fence = (SELECT max(s.fence) FROM spending AS s WHERE s.request = :id AND s.remote = :remote)
  AND EXISTS (
    SELECT 1 FROM requests AS r
    WHERE r.id = :id AND r.fence = :fence
      AND (spending.settled = 0 OR spending.fence = :fence OR r.remote_task IS NOT NULL))
