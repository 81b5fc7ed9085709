-- What a remote engine has been asked to do for a request. `remote` says who may take it up: the remote's name, a line
-- feed, the place where it is; or nothing while it is being handed over, which is for anybody.
ALTER TABLE requests ADD COLUMN remote_task bytea, ADD COLUMN remote text;
ALTER TABLE requests
  ADD CONSTRAINT remote_task_has_remote CHECK ((remote IS NULL) = (remote_task IS NULL)),
  ADD CONSTRAINT remote_task_has_inputs CHECK (remote_task IS NULL OR (inputs = 'ready' AND state <> 'cancelled'));

-- A request that has such a task is in no line for claims.
DROP INDEX requests_ready;
DROP INDEX requests_ready_by_account;
CREATE INDEX requests_ready ON requests (model, priority DESC, seq)
  WHERE state || '/' || inputs = 'queued/ready' AND remote_task IS NULL;
CREATE INDEX requests_ready_by_account ON requests (model, account, priority DESC, seq)
  WHERE inputs || '/' || state = 'ready/queued' AND remote_task IS NULL;
-- Each key's part of each model's line.
CREATE INDEX requests_ready_by_key ON requests (model, key_id, priority DESC, seq)
  WHERE state || ':' || inputs = 'queued:ready' AND remote_task IS NULL;
CREATE INDEX requests_resumable ON requests (seq) WHERE state || '/remote' = 'queued/remote' AND remote IS NOT NULL;

-- How long the latest on local engines took.
CREATE INDEX requests_paced ON requests (finished_at) INCLUDE (model, started_at)
  WHERE state || '' = 'succeeded' AND remote_task IS NULL AND engine <> 'draft';

-- How many servers have passed the request on to this one.
ALTER TABLE requests ADD COLUMN hops integer NOT NULL DEFAULT 0 CHECK (hops >= 0);

DROP FUNCTION submit_requests(
  text[], text[], text[], text[], integer[], text[], bytea[], bytea[], text[], integer[]);

-- As before, with the hops. Insert a group of submits. Answers one outcome per member, in the group's order: 'stored', 'full' (the key
-- has as many queued requests as it may have), 'gone' (it names files that retention has taken: `swept` says
-- which), or 'known' (this id is there already: a retry after an answer that was lost, or somebody else's id;
-- the caller compares). No id may stand twice in a group.
CREATE FUNCTION submit_requests(
  ids text[], accounts text[], key_ids text[], models text[], priorities integer[], inputs_states text[],
  inputs bytea[], sources_ bytea[], storage_keys_ text[], queue_limits integer[], hops_ integer[]
) RETURNS TABLE (place bigint, outcome text, swept text[]) LANGUAGE plpgsql AS $$
DECLARE
  lock bigint;
BEGIN
  -- The lock makes count and insert one step for each limited key; in order, so that groups cannot deadlock.
  FOR lock IN
    SELECT DISTINCT hashtextextended(m.key_id, 17) FROM unnest(key_ids, queue_limits) AS m (key_id, most)
    WHERE m.most > 0 ORDER BY 1
  LOOP
    PERFORM pg_advisory_xact_lock(lock);
  END LOOP;
  IF EXISTS (SELECT FROM unnest(storage_keys_) AS m (named) WHERE m.named <> '[]') THEN
    PERFORM pg_advisory_xact_lock_shared(sweep_lock());
  END IF;
  RETURN QUERY
  WITH named AS (
    SELECT m.*, ARRAY(SELECT jsonb_array_elements_text(m.storage_keys::jsonb)) AS names
    FROM unnest(ids, accounts, key_ids, models, priorities, inputs_states, inputs, sources_,
                storage_keys_, queue_limits, hops_) WITH ORDINALITY
      AS m (id, account, key_id, model, priority, inputs, input, sources, storage_keys, most, hops, place)
  ), member AS (
    SELECT n.*, CASE WHEN n.names = '{}' THEN '{}'
                ELSE ARRAY(SELECT k.key FROM swept_keys AS k WHERE k.key = ANY (n.names)) END AS swept
    FROM named AS n
  ), limited AS (
    SELECT k.key_id,
           (SELECT count(*) FROM requests AS r WHERE r.key_id = k.key_id AND r.state || '' = 'queued') AS queued
    FROM (SELECT DISTINCT m.key_id FROM member AS m WHERE m.most > 0) AS k
  ), allowed AS (
    SELECT m.*, m.most > 0
        AND l.queued + row_number() OVER (PARTITION BY m.key_id, m.swept <> '{}' ORDER BY m.place) > m.most
      AS is_full
    FROM member AS m LEFT JOIN limited AS l USING (key_id)
  ), stored AS (
    INSERT INTO requests (id, account, key_id, model, priority, inputs, input, sources, storage_keys, hops)
    SELECT a.id, a.account, a.key_id, a.model, a.priority, a.inputs, a.input, a.sources, a.names, a.hops
    FROM allowed AS a WHERE a.is_full IS NOT TRUE AND a.swept = '{}' ORDER BY a.place
    ON CONFLICT (id) DO NOTHING
    RETURNING requests.id
  )
  SELECT a.place,
         CASE WHEN s.id IS NOT NULL THEN 'stored'
              WHEN EXISTS (SELECT FROM requests AS r WHERE r.id = a.id) THEN 'known'
              WHEN a.swept <> '{}' THEN 'gone'
              WHEN a.is_full THEN 'full' ELSE 'known' END,
         a.swept
  FROM allowed AS a LEFT JOIN stored AS s USING (id) ORDER BY a.place;
END $$;

ALTER TABLE workers ADD COLUMN remotes bytea NOT NULL DEFAULT '[]';

-- What remotes may cost and did cost: a row for each time that a request was taken for a remote, by the fence of
-- that lease, then by that of the lease which settled it. `day` counts the days since the epoch (UTC). Reserved until
-- it is settled.
CREATE TABLE spending (
  request text NOT NULL,
  remote  text NOT NULL,
  fence   bigint NOT NULL,
  day     integer NOT NULL,
  key_id  text NOT NULL,
  usd     double precision NOT NULL CHECK (usd >= 0 AND usd < 'infinity'),
  settled boolean NOT NULL DEFAULT false,
  PRIMARY KEY (request, remote, fence)
);
CREATE INDEX spending_of_day ON spending (day, key_id) INCLUDE (usd);

CREATE FUNCTION utc_day() RETURNS integer LANGUAGE sql VOLATILE
  RETURN floor(epoch() / 86400)::integer;

-- In USD; a budget of 0 is none. What costs nothing fits as long as something is left. Sums that differ by less than
-- a billionth are the same: ten times 0.1 is not 1 in binary.
CREATE FUNCTION budget_fits(used double precision, more double precision, budget double precision)
RETURNS boolean LANGUAGE sql IMMUTABLE
  RETURN budget = 0 OR (used < budget - 1e-9 AND used + more <= budget + 1e-9);

-- Take this request for a remote and reserve its cost. Locks come in one order: the request's row, its account, the
-- budget of all, the key's budget. Whoever waits for one of the last three waits for no row, so nobody waits in a
-- circle. Each makes sum and reservation one step for all who look at the same sum.
CREATE FUNCTION take_request(
  of_id text, by_worker text, at_remote text, cost double precision, budget double precision,
  key_budget double precision, account_limit integer, OUT verdict text, OUT taken requests
) LANGUAGE plpgsql AS $$
DECLARE
  today integer := utc_day();
BEGIN
  SELECT r.* INTO taken FROM requests AS r WHERE r.id = of_id FOR UPDATE;
  IF NOT FOUND OR taken.state <> 'queued' OR taken.inputs <> 'ready' OR taken.remote_task IS NOT NULL THEN
    verdict := 'gone';
    RETURN;
  END IF;
  IF account_limit > 0 THEN
    PERFORM pg_advisory_xact_lock(hashtextextended(taken.account, 23));
    IF account_limit <= (SELECT count(*) FROM requests AS r WHERE r.account = taken.account
                         AND r.worker IS NOT NULL AND r.state = 'running') THEN
      verdict := 'account';
      RETURN;
    END IF;
  END IF;
  IF budget > 0 THEN
    PERFORM pg_advisory_xact_lock(hashtextextended('rushes.budget', 0));
    IF NOT budget_fits((SELECT coalesce(sum(s.usd), 0) FROM spending AS s WHERE s.day = today), cost, budget) THEN
      verdict := 'budget';
      RETURN;
    END IF;
  END IF;
  IF key_budget > 0 THEN
    PERFORM pg_advisory_xact_lock(hashtextextended(taken.key_id, 29));
    IF NOT budget_fits((SELECT coalesce(sum(s.usd), 0) FROM spending AS s
                 WHERE s.day = today AND s.key_id = taken.key_id), cost, key_budget) THEN
      verdict := 'key_budget';
      RETURN;
    END IF;
  END IF;
  verdict := 'taken';
  UPDATE requests AS r
  SET state = 'running', attempt = r.attempt + 1, fence = r.fence + 1, worker = by_worker, engine = at_remote,
      started_at = epoch(), progress = NULL
  WHERE r.seq = taken.seq RETURNING r.* INTO taken;
  INSERT INTO spending (request, remote, fence, day, key_id, usd)
  VALUES (of_id, at_remote, taken.fence, today, taken.key_id, cost);
END $$;

-- However a lease ends: where nothing was handed over, nothing will cost what was reserved. Whoever changes a
-- request's spending holds the request's row.
CREATE FUNCTION unreserve() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM spending AS s WHERE s.request = NEW.id AND NOT s.settled;
  RETURN NULL;
END $$;

CREATE TRIGGER requests_unreserve AFTER UPDATE OF worker ON requests FOR EACH ROW
  WHEN (OLD.state = 'running' AND NEW.worker IS NULL AND NEW.remote_task IS NULL)
  EXECUTE FUNCTION unreserve();

-- What the request cost at this remote, in place of what was reserved when it was taken, by this lease or by one that
-- it goes on for, or of what either settled before; not of what an earlier time there did cost. The day stays. A lease
-- that is lost changes nothing: the row's lock keeps the fence as it is.
CREATE FUNCTION settle_request(of_id text, of_fence bigint, at_remote text, cost double precision)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  payer text;
  goes_on boolean;
BEGIN
  SELECT r.key_id, r.remote_task IS NOT NULL INTO payer, goes_on FROM requests AS r
  WHERE r.id = of_id AND r.fence = of_fence FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  UPDATE spending AS s SET usd = cost, settled = true, fence = of_fence
  WHERE s.request = of_id AND s.remote = at_remote
    AND s.fence = (SELECT max(l.fence) FROM spending AS l WHERE l.request = of_id AND l.remote = at_remote)
    AND (NOT s.settled OR s.fence = of_fence OR goes_on);
  IF NOT FOUND AND cost > 0 THEN
    INSERT INTO spending (request, remote, fence, day, key_id, usd, settled)
    VALUES (of_id, at_remote, of_fence, utc_day(), payer, cost, true);
  END IF;
END $$;

-- As before, but for the requests that have a task at a remote. The first requests of one model's line, without
-- those of the accounts that are full. Where a long stretch of the line belongs to full accounts, step from account
-- to account through the index instead of over each row.
CREATE OR REPLACE FUNCTION line_heads(of_model text, full_accounts text[], depth integer)
RETURNS TABLE (seq bigint, model text, priority integer, created_at double precision)
LANGUAGE plpgsql STABLE ROWS 8 AS $$
BEGIN
  IF cardinality(full_accounts) = 0 THEN
    RETURN QUERY
      SELECT r.seq, r.model, r.priority, r.created_at FROM requests AS r
      WHERE r.model = of_model AND r.state || '/' || r.inputs = 'queued/ready' AND r.remote_task IS NULL
      ORDER BY r.priority DESC, r.seq LIMIT depth;
    RETURN;
  END IF;
  RETURN QUERY
    SELECT p.seq, p.model, p.priority, p.created_at FROM (
      SELECT r.seq, r.model, r.priority, r.created_at, r.account FROM requests AS r
      WHERE r.model = of_model AND r.state || '/' || r.inputs = 'queued/ready' AND r.remote_task IS NULL
      ORDER BY r.priority DESC, r.seq LIMIT 128) AS p
    WHERE p.account <> ALL (full_accounts)
    ORDER BY p.priority DESC, p.seq LIMIT depth;
  IF FOUND THEN
    RETURN;
  END IF;
  RETURN QUERY
    WITH RECURSIVE waiting AS (
      SELECT (SELECT min(r.account) FROM requests AS r
              WHERE r.model = of_model AND r.inputs || '/' || r.state = 'ready/queued'
                AND r.remote_task IS NULL) AS account
      UNION ALL
      SELECT (SELECT min(r.account) FROM requests AS r
              WHERE r.model = of_model AND r.inputs || '/' || r.state = 'ready/queued'
                AND r.remote_task IS NULL AND r.account > w.account)
      FROM waiting AS w WHERE w.account IS NOT NULL
    )
    SELECT h.seq, h.model, h.priority, h.created_at
    FROM waiting AS w CROSS JOIN LATERAL (
      SELECT r.seq, r.model, r.priority, r.created_at FROM requests AS r
      WHERE r.model = of_model AND r.account = w.account AND r.inputs || '/' || r.state = 'ready/queued'
        AND r.remote_task IS NULL
      ORDER BY r.priority DESC, r.seq LIMIT depth) AS h
    WHERE w.account <> ALL (full_accounts)
    ORDER BY h.priority DESC, h.seq LIMIT depth;
END $$;

-- Lock the request to take next, or answer NULL. Of the heads of the models' lines: the one that has waited
-- since `old`, else one of a warm model, else by priority and arrival. A row further back in a line comes into
-- play only where those ahead are locked by other claims; it never counts as better than they.
CREATE OR REPLACE FUNCTION lock_next(models text[], warm text[], old double precision, full_accounts text[])
RETURNS requests LANGUAGE plpgsql AS $$
DECLARE
  chosen requests;
  candidate bigint;
  depth integer;
BEGIN
  FOREACH depth IN ARRAY ARRAY[8, 512] LOOP
    FOR candidate IN
      SELECT c.seq FROM (
        SELECT h.*, max(CASE WHEN h.created_at <= old THEN 0 WHEN h.model = ANY (warm) THEN 1 ELSE 2 END)
                 OVER (PARTITION BY h.model ORDER BY h.priority DESC, h.seq) AS class
        FROM unnest(models) AS m (name) CROSS JOIN LATERAL line_heads(m.name, full_accounts, depth) AS h
      ) AS c
      ORDER BY c.class, c.priority DESC, c.seq
    LOOP
      SELECT r.* INTO chosen FROM requests AS r WHERE r.seq = candidate FOR UPDATE SKIP LOCKED;
      -- Locked, it is as it is now, which may be later than the look at the line.
      IF FOUND AND chosen.state = 'queued' AND chosen.inputs = 'ready' AND chosen.remote_task IS NULL THEN
        RETURN chosen;
      END IF;
    END LOOP;
    EXIT WHEN candidate IS NULL;
  END LOOP;
  RETURN NULL;
END $$;

-- End the leases on these requests, whose rows the caller has locked, without an outcome. `counted`: the
-- attempt counts, and at the limit the request fails. What goes on at a remote is the same attempt, whoever waits
-- for it: it is not counted.
CREATE OR REPLACE FUNCTION end_leases(seqs bigint[], counted boolean, why bytea, attempt_limit integer)
RETURNS TABLE (id text, state text) LANGUAGE sql AS $$
  UPDATE requests AS r
  SET state = CASE WHEN f.failed THEN 'failed' ELSE 'queued' END,
      inputs = CASE r.inputs WHEN 'fetching' THEN 'pending' ELSE r.inputs END,
      attempt = r.attempt
        - CASE WHEN r.state = 'running' AND (NOT counted OR r.remote_task IS NOT NULL) THEN 1 ELSE 0 END,
      worker = NULL,
      progress = CASE WHEN f.failed THEN r.progress END,
      failure = CASE WHEN f.failed THEN why END,
      finished_at = CASE WHEN f.failed THEN epoch() END
  FROM (
    SELECT l.seq,
           counted AND l.state = 'running' AND l.remote_task IS NULL AND l.attempt >= attempt_limit AS failed
    FROM requests AS l WHERE l.seq = ANY (seqs)) AS f
  WHERE r.seq = f.seq
  RETURNING r.id, r.state
$$;
