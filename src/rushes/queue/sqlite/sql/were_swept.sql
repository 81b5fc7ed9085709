SELECT key FROM swept_keys WHERE key IN (SELECT value FROM json_each(?))
