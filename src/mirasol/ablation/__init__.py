"""Suites of runs that differ in what is to be compared: planned, run on any number of machines, and reported."""
