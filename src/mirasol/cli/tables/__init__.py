"""Commands that make the tables of a paper."""
