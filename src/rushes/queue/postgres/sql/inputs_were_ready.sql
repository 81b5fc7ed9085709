SELECT FROM requests WHERE id = $1 AND fence = $2 AND inputs = 'ready' AND sources = $3
