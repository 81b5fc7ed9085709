UPDATE requests SET swept_at = :now WHERE id = :id AND finished_at IS NOT NULL AND swept_at IS NULL
