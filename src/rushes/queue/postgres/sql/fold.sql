SELECT fold_tally()
