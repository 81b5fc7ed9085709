SELECT account, seq, model, state, priority, progress FROM requests WHERE id = ?
