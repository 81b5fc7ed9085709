SELECT * FROM sweep_uploads($1, $2)
