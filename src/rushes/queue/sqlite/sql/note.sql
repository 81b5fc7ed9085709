UPDATE requests SET remote_task = :task, remote = :remote
WHERE id = :id AND fence = :fence AND state = 'running'
