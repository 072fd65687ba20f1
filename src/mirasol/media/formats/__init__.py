"""Formats by their first bytes, and those that PyAV does not decode itself."""
