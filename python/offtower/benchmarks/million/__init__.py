"""Learners under equal wall time on large catalogues, scored by exact expected rewards."""
