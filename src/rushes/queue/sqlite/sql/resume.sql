-- The engine is what stands before the separator; while the task was handed over, the one that it was taken for.
UPDATE requests
SET state = 'running', attempt = attempt + 1, fence = fence + 1, worker = :worker,
    engine = CASE remote WHEN '' THEN engine ELSE substr(remote, 1, instr(remote, char(10)) - 1) END,
    started_at = :now, progress = NULL
WHERE seq = :seq
RETURNING *
