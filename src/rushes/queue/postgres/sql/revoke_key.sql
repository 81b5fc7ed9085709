UPDATE keys SET revoked_at = coalesce(revoked_at, epoch()) WHERE id = $1 RETURNING *
