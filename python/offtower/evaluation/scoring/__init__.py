"""From logged rows and a policy to the numbers that estimators read."""
