"""Random input for everything that reads input: rows, files, shapes and manifests.

`make fuzz` draws new cases for a bounded time; the suite repeats the cases of seeds.json, which
are those that once failed. A case is a function of (target, seed). It passes where the code under
test returns a right result or raises an error meant for users.
"""
