"""What a run or a model costs before it starts: parameters, FLOPs, memory, time and disk."""
