-- What is reserved today for an earlier lease of the request at this remote.
SELECT total(usd) FROM spending WHERE request = :id AND remote = :remote AND settled = 0 AND day = :day
