SELECT coalesce(sum(usd), 0) AS usd FROM spending WHERE day = (SELECT utc_day()) AND ($1::text IS NULL OR key_id = $1)
