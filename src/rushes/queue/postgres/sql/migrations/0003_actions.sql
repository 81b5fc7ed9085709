-- The actions that need a loop, or locks and then a fresh look: each is one round trip.

-- Retention chooses what no live request names, and a submit names what retention has not taken: two looks at
-- what the other is about to write, so one of them has to wait. Submits that name stored files share this lock,
-- a sweep has it alone. Everybody else passes.
CREATE FUNCTION sweep_lock() RETURNS bigint LANGUAGE sql IMMUTABLE
  RETURN hashtextextended('rushes.sweep', 0);

-- Insert a group of submits. Answers one outcome per member, in the group's order: 'stored', 'full' (the key
-- has as many queued requests as it may have), 'gone' (it names files that retention has taken: `swept` says
-- which), or 'known' (this id is there already: a retry after an answer that was lost, or somebody else's id;
-- the caller compares). No id may stand twice in a group.
CREATE FUNCTION submit_requests(
  ids text[], accounts text[], key_ids text[], models text[], priorities integer[], inputs_states text[],
  inputs bytea[], sources_ bytea[], storage_keys_ text[], queue_limits integer[]
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
                storage_keys_, queue_limits) WITH ORDINALITY
      AS m (id, account, key_id, model, priority, inputs, input, sources, storage_keys, most, place)
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
    INSERT INTO requests (id, account, key_id, model, priority, inputs, input, sources, storage_keys)
    SELECT a.id, a.account, a.key_id, a.model, a.priority, a.inputs, a.input, a.sources, a.names
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

-- The first requests of one model's line, without those of the accounts that are full. Where a long stretch of
-- the line belongs to full accounts, step from account to account through the index instead of over each row.
CREATE FUNCTION line_heads(of_model text, full_accounts text[], depth integer)
RETURNS TABLE (seq bigint, model text, priority integer, created_at double precision)
LANGUAGE plpgsql STABLE ROWS 8 AS $$
BEGIN
  IF cardinality(full_accounts) = 0 THEN
    RETURN QUERY
      SELECT r.seq, r.model, r.priority, r.created_at FROM requests AS r
      WHERE r.model = of_model AND r.state || '/' || r.inputs = 'queued/ready'
      ORDER BY r.priority DESC, r.seq LIMIT depth;
    RETURN;
  END IF;
  RETURN QUERY
    SELECT p.seq, p.model, p.priority, p.created_at FROM (
      SELECT r.seq, r.model, r.priority, r.created_at, r.account FROM requests AS r
      WHERE r.model = of_model AND r.state || '/' || r.inputs = 'queued/ready'
      ORDER BY r.priority DESC, r.seq LIMIT 128) AS p
    WHERE p.account <> ALL (full_accounts)
    ORDER BY p.priority DESC, p.seq LIMIT depth;
  IF FOUND THEN
    RETURN;
  END IF;
  RETURN QUERY
    WITH RECURSIVE waiting AS (
      SELECT (SELECT min(r.account) FROM requests AS r
              WHERE r.model = of_model AND r.inputs || '/' || r.state = 'ready/queued') AS account
      UNION ALL
      SELECT (SELECT min(r.account) FROM requests AS r
              WHERE r.model = of_model AND r.inputs || '/' || r.state = 'ready/queued'
                AND r.account > w.account)
      FROM waiting AS w WHERE w.account IS NOT NULL
    )
    SELECT h.seq, h.model, h.priority, h.created_at
    FROM waiting AS w CROSS JOIN LATERAL (
      SELECT r.seq, r.model, r.priority, r.created_at FROM requests AS r
      WHERE r.model = of_model AND r.account = w.account AND r.inputs || '/' || r.state = 'ready/queued'
      ORDER BY r.priority DESC, r.seq LIMIT depth) AS h
    WHERE w.account <> ALL (full_accounts)
    ORDER BY h.priority DESC, h.seq LIMIT depth;
END $$;

-- Lock the request to take next, or answer NULL. Of the heads of the models' lines: the one that has waited
-- since `old`, else the warm model's, else by priority and arrival. A row further back in a line comes into
-- play only where those ahead are locked by other claims; it never counts as better than they.
CREATE FUNCTION lock_next(models text[], warm text, old double precision, full_accounts text[])
RETURNS requests LANGUAGE plpgsql AS $$
DECLARE
  chosen requests;
  candidate bigint;
  depth integer;
BEGIN
  FOREACH depth IN ARRAY ARRAY[8, 512] LOOP
    FOR candidate IN
      SELECT c.seq FROM (
        SELECT h.*, max(CASE WHEN h.created_at <= old THEN 0 WHEN h.model = warm THEN 1 ELSE 2 END)
                 OVER (PARTITION BY h.model ORDER BY h.priority DESC, h.seq) AS class
        FROM unnest(models) AS m (name) CROSS JOIN LATERAL line_heads(m.name, full_accounts, depth) AS h
      ) AS c
      ORDER BY c.class, c.priority DESC, c.seq
    LOOP
      SELECT r.* INTO chosen FROM requests AS r WHERE r.seq = candidate FOR UPDATE SKIP LOCKED;
      -- Locked, it is as it is now, which may be later than the look at the line.
      IF FOUND AND chosen.state = 'queued' AND chosen.inputs = 'ready' THEN
        RETURN chosen;
      END IF;
    END LOOP;
    EXIT WHEN candidate IS NULL;
  END LOOP;
  RETURN NULL;
END $$;

CREATE FUNCTION claim_request(
  by_worker text, with_engine text, models text[], warm text, age_bound double precision,
  account_limit integer
) RETURNS SETOF requests LANGUAGE plpgsql AS $$
DECLARE
  chosen requests;
  -- Without anything warm there is no preference to bound: plain priority and arrival.
  old double precision := CASE WHEN warm IS NULL THEN '-infinity' ELSE epoch() - age_bound END;
  full_accounts text[] := '{}';
BEGIN
  IF account_limit > 0 THEN
    SELECT coalesce(array_agg(f.account), '{}') INTO full_accounts FROM (
      SELECT r.account FROM requests AS r WHERE r.worker IS NOT NULL AND r.state = 'running'
      GROUP BY r.account HAVING count(*) >= account_limit) AS f;
  END IF;
  LOOP
    -- Leaving the block by the error gives the locks of this try back: nobody ever waits for one account's
    -- lock while holding another's.
    BEGIN
      chosen := lock_next(claim_request.models, claim_request.warm, old, full_accounts);
      IF chosen.seq IS NULL THEN
        RETURN;
      END IF;
      IF account_limit > 0 THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(chosen.account, 23));
        IF account_limit <= (SELECT count(*) FROM requests AS r WHERE r.account = chosen.account
                             AND r.worker IS NOT NULL AND r.state = 'running') THEN
          RAISE EXCEPTION 'full' USING ERRCODE = 'RU001';
        END IF;
      END IF;
      RETURN QUERY
        UPDATE requests AS r
        SET state = 'running', attempt = r.attempt + 1, fence = r.fence + 1, worker = by_worker,
            engine = with_engine, started_at = epoch(), progress = NULL
        WHERE r.seq = chosen.seq RETURNING r.*;
      RETURN;
    EXCEPTION WHEN SQLSTATE 'RU001' THEN
      full_accounts := full_accounts || chosen.account;
    END;
  END LOOP;
END $$;

-- End the leases on these requests, whose rows the caller has locked, without an outcome. `counted`: the
-- attempt counts, and at the limit the request fails.
CREATE FUNCTION end_leases(seqs bigint[], counted boolean, why bytea, attempt_limit integer)
RETURNS TABLE (id text, state text) LANGUAGE sql AS $$
  UPDATE requests AS r
  SET state = CASE WHEN f.failed THEN 'failed' ELSE 'queued' END,
      inputs = CASE r.inputs WHEN 'fetching' THEN 'pending' ELSE r.inputs END,
      attempt = r.attempt - CASE WHEN r.state = 'running' AND NOT counted THEN 1 ELSE 0 END,
      worker = NULL,
      progress = CASE WHEN f.failed THEN r.progress END,
      failure = CASE WHEN f.failed THEN why END,
      finished_at = CASE WHEN f.failed THEN epoch() END
  FROM (
    SELECT l.seq, counted AND l.state = 'running' AND l.attempt >= attempt_limit AS failed
    FROM requests AS l WHERE l.seq = ANY (seqs)) AS f
  WHERE r.seq = f.seq
  RETURNING r.id, r.state
$$;

-- Mark as swept the ended requests that are due, oldest first, and whose own files no live request names. What is
-- in `files` is an upload, and judged by itself. The outputs' JSON is this program's own; a NUL, which
-- PostgreSQL could not read, is in no key.
CREATE FUNCTION sweep_requests(before double precision, most integer) RETURNS SETOF requests
LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM requests AS r
                 WHERE r.finished_at < before AND r.finished_at IS NOT NULL AND r.swept_at IS NULL) THEN
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(sweep_lock());
  RETURN QUERY
  WITH due AS MATERIALIZED (
    SELECT r.seq FROM requests AS r
    WHERE r.finished_at < before AND r.finished_at IS NOT NULL AND r.swept_at IS NULL
      AND NOT EXISTS (
        SELECT FROM requests AS live
        WHERE live.state IN ('queued', 'running') AND live.storage_keys <> '{}'
          AND live.storage_keys && ARRAY(
            SELECT k.key FROM unnest(r.storage_keys) AS k (key)
            WHERE NOT EXISTS (SELECT FROM files AS f WHERE f.key = k.key)))
    ORDER BY r.finished_at, r.seq LIMIT most
  ), marked AS (
    UPDATE requests AS r SET swept_at = epoch() FROM due WHERE r.seq = due.seq RETURNING r.*
  ), kept AS (
    INSERT INTO swept_keys (key)
    SELECT DISTINCT o.value ->> 'key'
    FROM marked AS m CROSS JOIN LATERAL json_array_elements(convert_from(m.outputs, 'UTF8')::json) AS o (value)
    WHERE m.outputs IS NOT NULL
    ON CONFLICT DO NOTHING
  )
  SELECT * FROM marked AS m ORDER BY m.finished_at, m.seq;
END $$;

CREATE FUNCTION sweep_uploads(before double precision, most integer) RETURNS SETOF files
LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM files AS f WHERE f.created_at < before) THEN
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(sweep_lock());
  RETURN QUERY
  WITH due AS MATERIALIZED (
    SELECT f.id FROM files AS f
    WHERE f.created_at < before
      AND NOT EXISTS (
        SELECT FROM requests AS live
        WHERE live.state IN ('queued', 'running') AND live.storage_keys <> '{}'
          AND live.storage_keys && ARRAY[f.key])
    ORDER BY f.created_at, f.id LIMIT most
  ), removed AS (
    DELETE FROM files AS f USING due WHERE f.id = due.id RETURNING f.*
  ), kept AS (
    INSERT INTO swept_keys (key) SELECT r.key FROM removed AS r ON CONFLICT DO NOTHING
  )
  SELECT * FROM removed AS r ORDER BY r.created_at, r.id;
END $$;
