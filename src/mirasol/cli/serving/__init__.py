"""The command that serves a checkpoint to other programs."""
