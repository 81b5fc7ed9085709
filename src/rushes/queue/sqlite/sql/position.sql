SELECT 1
  + coalesce((SELECT sum(n) FROM queue_depth WHERE priority > :priority), 0)
  + coalesce((SELECT sum(n) FROM queue_depth WHERE priority = :priority AND bucket < :seq >> 9), 0)
  + (SELECT count(*) FROM requests INDEXED BY requests_queued
     WHERE state = 'queued' AND seq >= :seq >> 9 << 9 AND seq < :seq AND priority = :priority)
