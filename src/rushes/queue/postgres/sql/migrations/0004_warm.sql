-- A slot may be warm for several models: those that need the weights that its engine holds.
DROP FUNCTION claim_request(text, text, text[], text, double precision, integer);
DROP FUNCTION lock_next(text[], text, double precision, text[]);

-- Lock the request to take next, or answer NULL. Of the heads of the models' lines: the one that has waited
-- since `old`, else one of a warm model, else by priority and arrival. A row further back in a line comes into
-- play only where those ahead are locked by other claims; it never counts as better than they.
CREATE FUNCTION lock_next(models text[], warm text[], old double precision, full_accounts text[])
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
      IF FOUND AND chosen.state = 'queued' AND chosen.inputs = 'ready' THEN
        RETURN chosen;
      END IF;
    END LOOP;
    EXIT WHEN candidate IS NULL;
  END LOOP;
  RETURN NULL;
END $$;

CREATE FUNCTION claim_request(
  by_worker text, with_engine text, models text[], warm text[], age_bound double precision,
  account_limit integer
) RETURNS SETOF requests LANGUAGE plpgsql AS $$
DECLARE
  chosen requests;
  -- Without anything warm there is no preference to bound: plain priority and arrival.
  old double precision := CASE WHEN warm = '{}' THEN '-infinity' ELSE epoch() - age_bound END;
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
