SELECT * FROM keys WHERE hash = $1
