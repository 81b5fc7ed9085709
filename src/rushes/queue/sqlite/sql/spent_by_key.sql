SELECT total(usd) FROM spending WHERE day = :day AND key_id = :key_id
