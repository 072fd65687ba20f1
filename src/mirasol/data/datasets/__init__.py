"""Data sets as they are on a user's disk: one adapter each, one contract. docs/datasets.md has a section on each."""
