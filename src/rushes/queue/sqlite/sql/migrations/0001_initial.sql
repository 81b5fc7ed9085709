-- The requests table is the queue. Invariants are constraints: a state that cannot be cannot be stored.
CREATE TABLE requests (
  seq         INTEGER PRIMARY KEY,
  id          TEXT    NOT NULL UNIQUE,
  account     TEXT    NOT NULL,
  key_id      TEXT    NOT NULL,
  model       TEXT    NOT NULL,
  state       TEXT    NOT NULL DEFAULT 'queued'
              CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
  priority    INTEGER NOT NULL DEFAULT 0,
  attempt     INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
  fence       INTEGER NOT NULL DEFAULT 0,
  beat        INTEGER NOT NULL DEFAULT 0,
  inputs      TEXT    NOT NULL CHECK (inputs IN ('pending', 'fetching', 'ready')),
  worker      TEXT,
  engine      TEXT,
  progress    BLOB,
  created_at  REAL    NOT NULL,
  started_at  REAL,
  finished_at REAL,
  cost_usd    REAL,
  swept_at    REAL,
  input       BLOB    NOT NULL,
  sources     BLOB    NOT NULL,
  outputs     BLOB,
  failure     BLOB,
  CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
  CHECK ((worker IS NOT NULL) = (state = 'running' OR (state = 'queued' AND inputs = 'fetching'))),
  CHECK ((state = 'succeeded') = (outputs IS NOT NULL)),
  CHECK ((state = 'failed') = (failure IS NOT NULL)),
  CHECK (state NOT IN ('running', 'succeeded') OR (inputs = 'ready' AND started_at IS NOT NULL)),
  CHECK (swept_at IS NULL OR finished_at IS NOT NULL)
) STRICT;

-- The head of each model's queue; the same for each account's part of it, where accounts have limits.
CREATE INDEX requests_ready ON requests (model, priority DESC, seq)
  WHERE state = 'queued' AND inputs = 'ready';
CREATE INDEX requests_ready_by_account ON requests (model, account, priority DESC, seq)
  WHERE state = 'queued' AND inputs = 'ready';
CREATE INDEX requests_pending ON requests (model, seq) WHERE state = 'queued' AND inputs = 'pending';
CREATE INDEX requests_queued ON requests (seq, priority, model) WHERE state = 'queued';
CREATE INDEX requests_queued_by_key ON requests (key_id) WHERE state = 'queued';
CREATE INDEX requests_leased ON requests (worker) WHERE worker IS NOT NULL;
CREATE INDEX requests_running ON requests (account) WHERE state = 'running';
CREATE INDEX requests_of_account ON requests (account, seq);
CREATE INDEX requests_state ON requests (state, seq);
CREATE INDEX requests_sweepable ON requests (finished_at) WHERE finished_at IS NOT NULL AND swept_at IS NULL;

-- How many requests are queued in each run of 64 arrivals (level 0) and of 4096 (level 1): a position is a sum
-- of a few dozen of these and a count inside one short run, instead of a count of the whole queue. ``rank``
-- is the negated priority, so that what is ahead comes first.
CREATE TABLE queue_depth (
  level  INTEGER NOT NULL,
  rank   INTEGER NOT NULL,
  bucket INTEGER NOT NULL,
  model  TEXT    NOT NULL,
  n      INTEGER NOT NULL CHECK (n > 0),
  PRIMARY KEY (level, rank, bucket, model)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER requests_enter_on_insert AFTER INSERT ON requests WHEN NEW.state = 'queued'
BEGIN
  INSERT INTO queue_depth
    VALUES (0, -NEW.priority, NEW.seq >> 6, NEW.model, 1), (1, -NEW.priority, NEW.seq >> 12, NEW.model, 1)
    ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER requests_enter AFTER UPDATE OF state ON requests
  WHEN NEW.state = 'queued' AND OLD.state <> 'queued'
BEGIN
  INSERT INTO queue_depth
    VALUES (0, -NEW.priority, NEW.seq >> 6, NEW.model, 1), (1, -NEW.priority, NEW.seq >> 12, NEW.model, 1)
    ON CONFLICT DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER requests_leave AFTER UPDATE OF state ON requests
  WHEN OLD.state = 'queued' AND NEW.state <> 'queued'
BEGIN
  DELETE FROM queue_depth
    WHERE level = 0 AND rank = -OLD.priority AND bucket = OLD.seq >> 6 AND model = OLD.model AND n = 1;
  UPDATE queue_depth SET n = n - 1
    WHERE level = 0 AND rank = -OLD.priority AND bucket = OLD.seq >> 6 AND model = OLD.model AND n > 1;
  DELETE FROM queue_depth
    WHERE level = 1 AND rank = -OLD.priority AND bucket = OLD.seq >> 12 AND model = OLD.model AND n = 1;
  UPDATE queue_depth SET n = n - 1
    WHERE level = 1 AND rank = -OLD.priority AND bucket = OLD.seq >> 12 AND model = OLD.model AND n > 1;
END;

-- Which storage keys the queued and running requests name in their sources: retention asks for each of a due
-- request's files whether it is among them.
CREATE TABLE live_keys (
  seq INTEGER NOT NULL,
  key TEXT    NOT NULL,
  PRIMARY KEY (seq, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX live_keys_by_key ON live_keys (key);

CREATE TRIGGER requests_name_on_insert AFTER INSERT ON requests WHEN NEW.sources <> x'7b7d'
BEGIN
  INSERT INTO live_keys
    SELECT NEW.seq, json_extract(s.value, n.path) FROM json_each(CAST(NEW.sources AS TEXT)) AS s
    JOIN (SELECT '$.key' AS path UNION ALL SELECT '$.value') AS n
      ON n.path = '$.key' OR json_extract(s.value, '$.kind') = 'stored'
    WHERE json_extract(s.value, n.path) IS NOT NULL
    ON CONFLICT DO NOTHING;
END;

CREATE TRIGGER requests_name AFTER UPDATE OF sources ON requests WHEN NEW.sources <> x'7b7d'
BEGIN
  INSERT INTO live_keys
    SELECT NEW.seq, json_extract(s.value, n.path) FROM json_each(CAST(NEW.sources AS TEXT)) AS s
    JOIN (SELECT '$.key' AS path UNION ALL SELECT '$.value') AS n
      ON n.path = '$.key' OR json_extract(s.value, '$.kind') = 'stored'
    WHERE json_extract(s.value, n.path) IS NOT NULL
    ON CONFLICT DO NOTHING;
END;

CREATE TRIGGER requests_name_no_more AFTER UPDATE OF state ON requests
  WHEN NEW.state NOT IN ('queued', 'running') AND NEW.sources <> x'7b7d'
BEGIN
  DELETE FROM live_keys WHERE seq = NEW.seq;
END;

CREATE TRIGGER requests_vanish AFTER DELETE ON requests
BEGIN
  DELETE FROM live_keys WHERE seq = OLD.seq;
END;

-- The keys of outputs and uploads that retention has taken. A submit that names one is refused, in its own
-- transaction: it may have looked before they were taken.
CREATE TABLE swept_keys (
  key TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- An outcome is for ever.
CREATE TRIGGER requests_outcome_stays BEFORE UPDATE OF state, outputs, failure ON requests
  WHEN OLD.state IN ('succeeded', 'failed', 'cancelled') AND NEW.state <> OLD.state
BEGIN
  SELECT RAISE(ABORT, 'a request has one outcome');
END;

CREATE TABLE workers (
  id         TEXT    PRIMARY KEY,
  host       TEXT    NOT NULL,
  pid        INTEGER NOT NULL,
  slots      INTEGER NOT NULL,
  models     TEXT    NOT NULL,
  engine     TEXT    NOT NULL,
  owner      TEXT    NOT NULL,
  wake_port  INTEGER NOT NULL,
  beat       INTEGER NOT NULL DEFAULT 0,
  started_at REAL    NOT NULL
) STRICT;

CREATE TABLE keys (
  id         TEXT PRIMARY KEY,
  account    TEXT NOT NULL,
  name       TEXT NOT NULL,
  hash       BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
  hint       TEXT NOT NULL,
  created_at REAL NOT NULL,
  revoked_at REAL
) STRICT;

CREATE TABLE files (
  id           TEXT    PRIMARY KEY,
  account      TEXT    NOT NULL,
  name         TEXT    NOT NULL,
  key          TEXT    NOT NULL UNIQUE,
  content_type TEXT    NOT NULL,
  size         INTEGER NOT NULL,
  created_at   REAL    NOT NULL
) STRICT;
CREATE INDEX files_by_age ON files (created_at);

CREATE TABLE secrets (
  name  TEXT PRIMARY KEY,
  value BLOB NOT NULL CHECK (length(value) = 32)
) STRICT;
