-- What an earlier lease reserved and did not settle, or what came to nothing.
DELETE FROM spending WHERE request = :id AND remote = :remote AND (settled = 0 OR usd = 0)
