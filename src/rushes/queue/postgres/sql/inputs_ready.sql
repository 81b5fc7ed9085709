UPDATE requests SET inputs = 'ready', worker = NULL, sources = $3, storage_keys = $4::text[]
WHERE id = $1 AND fence = $2 AND state = 'queued' AND inputs = 'fetching'
RETURNING id
