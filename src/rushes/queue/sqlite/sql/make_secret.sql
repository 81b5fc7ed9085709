INSERT OR IGNORE INTO secrets (name, value) VALUES (?, ?)
