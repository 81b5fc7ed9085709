SELECT total(usd) FROM spending WHERE day = :day
