SELECT verdict, (taken).* FROM take_request($1, $2, $3, $4, $5, $6, $7)
