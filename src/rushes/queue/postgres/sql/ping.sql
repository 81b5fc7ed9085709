-- Readable, and writable: a standby or a read-only database refuses the number.
SELECT txid_current(), pg_is_in_recovery() AS standby
