"""`python -P -m offtower.cli`."""

from offtower.cli import main

main()
