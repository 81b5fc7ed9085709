SELECT state, attempt, beat FROM requests WHERE id = :id AND fence = :fence AND worker IS NOT NULL
