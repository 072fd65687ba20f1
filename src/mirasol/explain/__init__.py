"""What the model does with one clip and one question: where it looks, what it remembers, what mattered."""

from mirasol.explain.compute import Explanation, explain

__all__ = ["Explanation", "explain"]
