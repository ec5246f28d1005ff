"""Exact values of the policies that each method learns, on simulated logs with known rewards."""
