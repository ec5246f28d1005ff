"""Formats of source files: kinds of columns, how cells are written, and their conversion."""
