SELECT * FROM claim_request($1, $2, $3, $4, $5, $6)
