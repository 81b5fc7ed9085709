UPDATE requests SET remote_task = $3, remote = $4 WHERE id = $1 AND fence = $2 AND state = 'running'
RETURNING id
