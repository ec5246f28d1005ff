"""From diagnostics and intervals to a verdict on a policy."""
