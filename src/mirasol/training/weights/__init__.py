"""The weights of a run: which it begins with, which of them a stage trains, and adapters in their place."""
