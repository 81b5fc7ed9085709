SELECT 1
  + coalesce((SELECT sum(n) FROM queue_depth
              WHERE level = 1 AND (rank, bucket) < (-:priority, :seq >> 12)), 0)
  + coalesce((SELECT sum(n) FROM queue_depth
              WHERE level = 0 AND rank = -:priority AND bucket >= :seq >> 12 << 6 AND bucket < :seq >> 6), 0)
  + (SELECT count(*) FROM requests INDEXED BY requests_queued
     WHERE state = 'queued' AND seq >= :seq >> 6 << 6 AND seq < :seq AND priority = :priority)
