-- The beat only ever moves on: a reaper that sees it stand still takes the worker for dead.
INSERT INTO workers (id, host, pid, slots, models, engine, owner, wake_port, beat, started_at, remotes)
VALUES (:id, :host, :pid, :slots, :models, :engine, :owner, :wake_port, :beat, :started_at, :remotes)
ON CONFLICT (id) DO UPDATE
SET host = excluded.host, pid = excluded.pid, slots = excluded.slots, models = excluded.models,
    engine = excluded.engine, owner = excluded.owner, wake_port = excluded.wake_port, beat = workers.beat + 1,
    started_at = excluded.started_at, remotes = excluded.remotes
