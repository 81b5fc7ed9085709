SELECT * FROM files WHERE id = $1 AND ($2::text IS NULL OR account = $2)
