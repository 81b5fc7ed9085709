-- What a remote engine has been asked to do for a request. ``remote`` says who may take it up: the remote's name, a line
-- feed, the place where it is; or nothing while it is being handed over, which is for anybody.
ALTER TABLE requests ADD COLUMN remote_task BLOB
  CHECK (remote_task IS NULL OR (inputs = 'ready' AND state <> 'cancelled'));
ALTER TABLE requests ADD COLUMN remote TEXT CHECK ((remote IS NULL) = (remote_task IS NULL));
-- How many servers have passed the request on to this one.
ALTER TABLE requests ADD COLUMN hops INTEGER NOT NULL DEFAULT 0 CHECK (hops >= 0);

-- A request that has such a task is in no line for claims.
DROP INDEX requests_ready;
DROP INDEX requests_ready_by_account;
CREATE INDEX requests_ready ON requests (model, priority DESC, seq)
  WHERE state = 'queued' AND inputs = 'ready' AND remote_task IS NULL;
CREATE INDEX requests_ready_by_account ON requests (model, account, priority DESC, seq)
  WHERE state = 'queued' AND inputs = 'ready' AND remote_task IS NULL;
-- Each key's part of each model's line.
CREATE INDEX requests_ready_by_key ON requests (model, key_id, priority DESC, seq)
  WHERE state = 'queued' AND inputs = 'ready' AND remote_task IS NULL;
CREATE INDEX requests_resumable ON requests (seq, remote, model) WHERE state = 'queued' AND remote_task IS NOT NULL;

-- How long the latest on local engines took.
CREATE INDEX requests_paced ON requests (finished_at, model, started_at)
  WHERE state = 'succeeded' AND remote_task IS NULL AND engine <> 'draft';

ALTER TABLE workers ADD COLUMN remotes BLOB NOT NULL DEFAULT x'5b5d';

-- What remotes may cost and did cost: a row for each time that a request was taken for a remote, by the fence of
-- that lease, then by that of the lease which settled it. ``day`` counts the days since the epoch (UTC). Reserved until
-- it is settled.
CREATE TABLE spending (
  request TEXT    NOT NULL,
  remote  TEXT    NOT NULL,
  fence   INTEGER NOT NULL,
  day     INTEGER NOT NULL,
  key_id  TEXT    NOT NULL,
  usd     REAL    NOT NULL CHECK (usd >= 0),
  settled INTEGER NOT NULL DEFAULT 0 CHECK (settled IN (0, 1)),
  PRIMARY KEY (request, remote, fence)
) STRICT, WITHOUT ROWID;
CREATE INDEX spending_of_day ON spending (day, key_id, usd);

-- However a lease ends: where nothing was handed over, nothing will cost what was reserved.
CREATE TRIGGER requests_unreserve AFTER UPDATE OF worker ON requests
  WHEN OLD.state = 'running' AND NEW.worker IS NULL AND NEW.remote_task IS NULL
BEGIN
  DELETE FROM spending WHERE request = NEW.id AND settled = 0;
END;
