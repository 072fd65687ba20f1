"""Lets `python -m mirasol.cli` run the command, as torchrun needs it."""

from mirasol.cli.main import main

main()
