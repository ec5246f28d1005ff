"""Fault injection: damage a file that offtower wrote, read it, and classify what happens."""
