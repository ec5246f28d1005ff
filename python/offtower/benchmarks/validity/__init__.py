"""Coverage of intervals and error rates of verdicts, over worlds of known values."""
