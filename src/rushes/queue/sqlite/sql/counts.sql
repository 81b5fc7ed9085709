SELECT state, count(*) FROM requests GROUP BY state
