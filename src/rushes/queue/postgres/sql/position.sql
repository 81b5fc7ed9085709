SELECT 1
  + coalesce((
      SELECT sum(n) FROM tally
      WHERE state = 'queued' AND (priority > $2::integer OR (priority = $2 AND span < $1::bigint >> 15))
        AND ($3::text[] IS NULL OR model = ANY ($3))), 0)::bigint
  + coalesce((
      SELECT sum(n) FROM tally_bucket
      WHERE priority = $2 AND bucket >= ($1 >> 15) << 6 AND bucket < $1 >> 9
        AND ($3 IS NULL OR model = ANY ($3))), 0)::bigint
  + coalesce((
      SELECT sum(n) FROM tally_change
      WHERE state = 'queued' AND (priority > $2 OR (priority = $2 AND bucket < $1 >> 9))
        AND ($3 IS NULL OR model = ANY ($3))), 0)::bigint
  -- The conditions stand in the filter so that there is one index to choose: the bucket's rows by seq.
  + (SELECT count(*) FILTER (WHERE state = 'queued' AND priority = $2 AND ($3 IS NULL OR model = ANY ($3)))
     FROM requests WHERE seq >= ($1 >> 9) << 9 AND seq < $1)
