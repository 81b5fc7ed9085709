INSERT OR REPLACE INTO workers
  (id, host, pid, slots, models, engine, owner, wake_port, beat, started_at, remotes)
VALUES (:id, :host, :pid, :slots, :models, :engine, :owner, :wake_port, :beat, :started_at, :remotes)
