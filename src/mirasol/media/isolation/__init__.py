"""Decoding untrusted media in other processes: a file that crashes, stalls or floods one costs itself alone."""
