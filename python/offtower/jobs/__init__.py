"""The same work as Ray jobs: on the cores of one machine, or on a cluster.

Importing this package imports no Ray; `connect.import_ray` does, where a job starts.
"""

from __future__ import annotations
