SELECT * FROM requests WHERE id = ?
