"""Data sets as a few large tar files: format, plan, writing and verification."""
