SELECT * FROM sweep_requests($1, $2)
