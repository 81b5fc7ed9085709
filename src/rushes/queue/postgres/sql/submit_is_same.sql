-- Whether the request under this id is the one that was to be submitted.
SELECT account = $2 AND key_id = $3 AND model = $4 AND input = $5 AS same FROM requests WHERE id = $1
