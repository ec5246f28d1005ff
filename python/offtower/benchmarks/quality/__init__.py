"""Learning quality: the exact value of what each method learns, in worlds with known truth."""
