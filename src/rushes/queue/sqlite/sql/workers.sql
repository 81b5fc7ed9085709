SELECT id, host, pid, slots, models, engine, owner, wake_port, beat, started_at FROM workers ORDER BY id
