SELECT sources FROM requests WHERE state IN ('queued', 'running') AND sources <> x'7b7d'
