SELECT settle_request($1, $2, $3, $4)
