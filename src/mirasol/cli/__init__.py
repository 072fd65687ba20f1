"""The commands of `mirasol`, one module each: HELP, DESCRIPTION, add_arguments and run.

They import what they need when they run, so that `--help` comes at once.
"""
