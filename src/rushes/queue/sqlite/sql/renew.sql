UPDATE requests SET beat = beat + 1, progress = coalesce(:progress, progress)
WHERE id = :id AND fence = :fence AND worker IS NOT NULL
