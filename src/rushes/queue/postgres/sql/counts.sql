SELECT state, sum(n)::bigint AS n
FROM (SELECT state, n FROM tally UNION ALL SELECT state, n FROM tally_change) AS t
GROUP BY state
