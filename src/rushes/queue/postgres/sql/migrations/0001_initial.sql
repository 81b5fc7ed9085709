-- The requests table is the queue. Invariants are constraints: a state that cannot be cannot be stored.
-- Times are seconds since the epoch by this server's clock. JSON is kept as bytea: jsonb refuses NUL.

CREATE FUNCTION epoch() RETURNS double precision LANGUAGE sql VOLATILE
  RETURN extract(epoch FROM clock_timestamp())::double precision;

CREATE TABLE requests (
  seq          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id           text NOT NULL UNIQUE,
  account      text NOT NULL,
  key_id       text NOT NULL,
  model        text NOT NULL,
  state        text NOT NULL DEFAULT 'queued'
               CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
  priority     integer NOT NULL DEFAULT 0,
  attempt      integer NOT NULL DEFAULT 0 CHECK (attempt >= 0),
  fence        bigint NOT NULL DEFAULT 0,
  beat         bigint NOT NULL DEFAULT 0,
  inputs       text NOT NULL CHECK (inputs IN ('pending', 'fetching', 'ready')),
  worker       text,
  engine       text,
  progress     bytea,
  created_at   double precision NOT NULL DEFAULT epoch(),
  started_at   double precision,
  finished_at  double precision,
  cost_usd     double precision,
  swept_at     double precision,
  input        bytea NOT NULL,
  sources      bytea NOT NULL,
  outputs      bytea,
  failure      bytea,
  -- Every key of our storage that sources and outputs name, for retention.
  storage_keys text[] NOT NULL DEFAULT '{}',
  CONSTRAINT ended_has_finished_at
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
  CONSTRAINT leased_has_worker
    CHECK ((worker IS NOT NULL) = (state = 'running' OR (state = 'queued' AND inputs = 'fetching'))),
  CONSTRAINT succeeded_has_outputs CHECK ((state = 'succeeded') = (outputs IS NOT NULL)),
  CONSTRAINT failed_has_failure CHECK ((state = 'failed') = (failure IS NOT NULL)),
  CONSTRAINT started_has_inputs
    CHECK (state NOT IN ('running', 'succeeded') OR (inputs = 'ready' AND started_at IS NOT NULL)),
  CONSTRAINT swept_has_ended CHECK (swept_at IS NULL OR finished_at IS NOT NULL)
) WITH (fillfactor = 80);  -- room for a heartbeat's new row version on the same page

-- A partial index must serve only the statement that it was made for: with the statistics of a queue, always
-- old, a planner takes any partial index that a condition implies for an empty one, and walks through all of
-- it. Hence predicates as expressions, which only those statements repeat.

-- The head of each model's queue; the same for each account's part of it, where accounts have limits.
CREATE INDEX requests_ready ON requests (model, priority DESC, seq)
  WHERE state || '/' || inputs = 'queued/ready';
CREATE INDEX requests_ready_by_account ON requests (model, account, priority DESC, seq)
  WHERE inputs || '/' || state = 'ready/queued';
CREATE INDEX requests_pending ON requests (seq) WHERE state || '/' || inputs = 'queued/pending';
CREATE INDEX requests_queued_by_key ON requests (key_id) WHERE state || '' = 'queued';
CREATE INDEX requests_leased ON requests (account) WHERE worker IS NOT NULL;
CREATE INDEX requests_of_account ON requests (account, seq);
CREATE INDEX requests_sweepable ON requests (finished_at, seq)
  WHERE finished_at IS NOT NULL AND swept_at IS NULL;
CREATE INDEX requests_live_keys ON requests USING gin (storage_keys)
  WHERE state IN ('queued', 'running') AND storage_keys <> '{}';

CREATE TABLE workers (
  id         text PRIMARY KEY,
  host       text NOT NULL,
  pid        bigint NOT NULL,
  slots      integer NOT NULL,
  models     text[] NOT NULL,
  engine     text NOT NULL,
  owner      text NOT NULL,
  wake_port  integer NOT NULL,
  beat       bigint NOT NULL,
  started_at double precision NOT NULL
);

CREATE TABLE keys (
  id         text PRIMARY KEY,
  account    text NOT NULL,
  name       text NOT NULL,
  hash       bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
  hint       text NOT NULL,
  created_at double precision NOT NULL,
  revoked_at double precision
);

CREATE TABLE files (
  id           text PRIMARY KEY,
  account      text NOT NULL,
  name         bytea NOT NULL,  -- UTF-8 of a user's own file name
  key          text NOT NULL UNIQUE,
  content_type text NOT NULL,
  size         bigint NOT NULL,
  created_at   double precision NOT NULL
);
CREATE INDEX files_by_age ON files (created_at);

-- The keys of outputs and uploads that retention has taken. A submit that names one is refused.
CREATE TABLE swept_keys (
  key text PRIMARY KEY
);

CREATE TABLE secrets (
  name  text PRIMARY KEY,
  value bytea NOT NULL CHECK (length(value) = 32)
);
