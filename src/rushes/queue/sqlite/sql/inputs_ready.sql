UPDATE requests SET inputs = 'ready', worker = NULL, sources = :sources
WHERE id = :id AND fence = :fence AND state = 'queued' AND inputs = 'fetching'
