"""Run offtower on Ray: on the cores of one machine, or on a cluster.

Importing this package does not import Ray; `resources.import_ray` does when a job starts.
"""
