SELECT id, host, pid, slots, models, engine, owner, wake_port, beat, started_at, remotes FROM workers ORDER BY id
