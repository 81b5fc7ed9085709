SELECT id, account, seq, model, state, priority, progress FROM requests WHERE id = ANY ($1::text[])
