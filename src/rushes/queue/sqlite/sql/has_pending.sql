SELECT 1 FROM json_each(:models) AS m JOIN requests AS p
  ON p.model = m.value AND p.state = 'queued' AND p.inputs = 'pending' LIMIT 1
