"""Data sets: the `Example` that every one becomes, the reader of plain folders, and the synthetic shapes and sounds."""
