"""The model in use: a server that existing clients speak to, and sources that are still running."""
