"""The policies that made a log, where they are known."""
