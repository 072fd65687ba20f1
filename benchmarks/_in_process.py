"""Reading without a decoder process, for comparison; importable by loading workers."""

from torch import Tensor

from mirasol.data.clip_cache import ClipCache
from mirasol.media import isolation


def run_here(limits, file, function, /, *args, **kwargs):
    """As `run_isolated`, in this process."""
    return function(*args, **kwargs)


class InProcessCache(ClipCache):
    """Decodes in the process that loads, as before decoder processes existed."""

    def load(self, media: str, start: float | None = None, end: float | None = None) -> dict[str, Tensor]:
        isolation.run_isolated = run_here
        return super().load(media, start, end)
