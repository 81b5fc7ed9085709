SELECT wake_port FROM workers WHERE wake_port <> 0
