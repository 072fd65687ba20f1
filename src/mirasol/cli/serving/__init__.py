"""Commands that answer while something plays, or others ask."""
