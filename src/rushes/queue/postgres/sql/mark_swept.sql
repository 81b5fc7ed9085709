UPDATE requests SET swept_at = coalesce(swept_at, epoch())
WHERE id = ANY ($1::text[]) AND state IN ('succeeded', 'failed', 'cancelled')
