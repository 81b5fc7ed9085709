-- How many requests there are: by state, and the queued ones also by model, priority and place in the order of
-- arrival, in buckets of 512 (seq >> 9) and in spans of 64 buckets (seq >> 15). A queue position is a sum of
-- spans, of the buckets inside one span, and a count inside one bucket; counting the queue itself takes 20 ms
-- at 100,000.
--
-- A row per bucket that every submit and claim updates would be a hot row. So changes are appended to
-- tally_change, and folded into the sums from time to time, in one transaction: the sum over all is exact at
-- every moment, for every snapshot.

CREATE TABLE tally (
  state    text NOT NULL,
  priority integer NOT NULL,
  span     bigint NOT NULL,
  model    text NOT NULL,
  n        bigint NOT NULL CHECK (n >= 0),
  PRIMARY KEY (state, priority, span, model)
) WITH (fillfactor = 50);

CREATE TABLE tally_bucket (
  priority integer NOT NULL,
  bucket   bigint NOT NULL,
  model    text NOT NULL,
  n        bigint NOT NULL CHECK (n >= 0),
  PRIMARY KEY (priority, bucket, model)
) WITH (fillfactor = 50);

-- The model is '', and priority and bucket 0, where the state is not queued.
CREATE TABLE tally_change (
  number   bigint GENERATED ALWAYS AS IDENTITY,
  state    text NOT NULL,
  model    text NOT NULL,
  priority integer NOT NULL,
  bucket   bigint NOT NULL,
  n        bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- One folder at a time; whoever comes second has nothing to do. A change is visible to a folder only with all
-- changes that it rests on (a claim is begun after its submit was committed), so no sum becomes negative.
CREATE FUNCTION fold_tally() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF NOT pg_try_advisory_xact_lock(hashtextextended('rushes.fold_tally', 0)) THEN
    RETURN;
  END IF;
  WITH taken AS (
    DELETE FROM tally_change RETURNING state, model, priority, bucket, n
  ), bucket_net AS (
    SELECT t.priority, t.bucket, t.model, sum(t.n) AS n FROM taken AS t WHERE t.state = 'queued'
    GROUP BY 1, 2, 3 HAVING sum(t.n) <> 0
  ), bucket_known AS (
    UPDATE tally_bucket AS b SET n = b.n + d.n FROM bucket_net AS d
    WHERE (b.priority, b.bucket, b.model) = (d.priority, d.bucket, d.model)
    RETURNING b.priority, b.bucket, b.model
  ), bucket_new AS (
    INSERT INTO tally_bucket (priority, bucket, model, n)
    SELECT d.* FROM bucket_net AS d
    WHERE (d.priority, d.bucket, d.model) NOT IN (SELECT k.priority, k.bucket, k.model FROM bucket_known AS k)
  ), net AS (
    SELECT t.state, t.priority, t.bucket >> 6 AS span, t.model, sum(t.n) AS n FROM taken AS t
    GROUP BY 1, 2, 3, 4 HAVING sum(t.n) <> 0
  ), known AS (
    UPDATE tally AS s SET n = s.n + d.n FROM net AS d
    WHERE (s.state, s.priority, s.span, s.model) = (d.state, d.priority, d.span, d.model)
    RETURNING s.state, s.priority, s.span, s.model
  )
  INSERT INTO tally (state, priority, span, model, n)
  SELECT d.* FROM net AS d
  WHERE (d.state, d.priority, d.span, d.model) NOT IN (SELECT k.state, k.priority, k.span, k.model FROM known AS k);
  DELETE FROM tally WHERE n = 0;
  DELETE FROM tally_bucket WHERE n = 0;
END $$;

-- Every 256th change folds, in its own transaction, so that no reader ever has many to add up.
CREATE FUNCTION fold_some() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  due boolean;
BEGIN
  SELECT bool_or(number % 256 = 0) INTO due FROM added;
  IF due THEN
    PERFORM fold_tally();
  END IF;
  RETURN NULL;
END $$;

CREATE TRIGGER tally_change_fold AFTER INSERT ON tally_change
  REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION fold_some();

CREATE FUNCTION tally_arrivals() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO tally_change (state, model, priority, bucket, n)
    SELECT state, CASE WHEN state = 'queued' THEN model ELSE '' END,
           CASE WHEN state = 'queued' THEN priority ELSE 0 END,
           CASE WHEN state = 'queued' THEN seq >> 9 ELSE 0 END, count(*)
    FROM arrived GROUP BY 1, 2, 3, 4;
  PERFORM pg_notify('rushes', '');
  RETURN NULL;
END $$;

CREATE TRIGGER requests_arrive AFTER INSERT ON requests
  REFERENCING NEW TABLE AS arrived FOR EACH STATEMENT EXECUTE FUNCTION tally_arrivals();

-- A claim tells nobody: no other worker gains by it, and a notification costs a lock at commit.
CREATE FUNCTION tally_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO tally_change (state, model, priority, bucket, n)
    SELECT r.state, CASE WHEN r.state = 'queued' THEN r.model ELSE '' END,
           CASE WHEN r.state = 'queued' THEN r.priority ELSE 0 END,
           CASE WHEN r.state = 'queued' THEN r.seq >> 9 ELSE 0 END, r.n
    FROM (VALUES (OLD.state, OLD.model, OLD.priority, OLD.seq, -1),
                 (NEW.state, NEW.model, NEW.priority, NEW.seq, 1)) AS r (state, model, priority, seq, n);
  IF NEW.state <> 'running' THEN
    PERFORM pg_notify('rushes', '');
  END IF;
  RETURN NULL;
END $$;

CREATE TRIGGER requests_move AFTER UPDATE OF state, model, priority ON requests FOR EACH ROW
  WHEN (OLD.state <> NEW.state OR OLD.model <> NEW.model OR OLD.priority <> NEW.priority)
  EXECUTE FUNCTION tally_move();

-- Inputs that are there, or are to be fetched again, are work for somebody.
CREATE FUNCTION tell_inputs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('rushes', '');
  RETURN NULL;
END $$;

CREATE TRIGGER requests_inputs AFTER UPDATE OF inputs ON requests FOR EACH ROW
  WHEN (NEW.state = 'queued' AND NEW.inputs <> OLD.inputs AND NEW.inputs <> 'fetching')
  EXECUTE FUNCTION tell_inputs();

-- An outcome is for ever, and a request does not vanish.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'request % is %: it has its outcome', OLD.id, OLD.state
    USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE TRIGGER requests_outcome_stays BEFORE UPDATE OF state, outputs, failure ON requests FOR EACH ROW
  WHEN (OLD.state IN ('succeeded', 'failed', 'cancelled')
        AND (OLD.state, OLD.outputs, OLD.failure) IS DISTINCT FROM (NEW.state, NEW.outputs, NEW.failure))
  EXECUTE FUNCTION refuse_change();
