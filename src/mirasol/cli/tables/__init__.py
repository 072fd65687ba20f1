"""Commands that make and compare tables of results."""
