SELECT id, fence, beat, worker FROM requests WHERE worker IS NOT NULL
