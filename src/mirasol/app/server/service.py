"""What all requests of a server share."""

import shutil
import tempfile
import time
from pathlib import Path

from mirasol.app.server.answerer import Answerer
from mirasol.app.server.clips import Clips
from mirasol.app.server.files import FileStore
from mirasol.app.server.journal import Journal, Metrics
from mirasol.app.server.settings import ServerSettings
from mirasol.checkpoint import read_doubt, read_weights_hash


class Service:
    """The state of a server: its model, its folder, and what is open now.

    folder: for uploaded files and parts of requests; made here, readable by this user alone, removed by `close`
    """

    def __init__(self, settings: ServerSettings, answerer: Answerer, journal: Journal | None = None):
        self.settings, self.answerer = settings, answerer
        self.journal, self.metrics = journal or Journal(), Metrics()
        self.folder = Path(tempfile.mkdtemp(prefix="mirasol-serve-"))
        self.files = FileStore(self.folder, settings.caps)
        self.clips = Clips(answerer, settings.caps, self.folder, lambda found: self.metrics.clips.labels(found).inc())
        self.doubt = read_doubt(answerer.folder)
        self.fingerprint = f"fp_{read_weights_hash(answerer.folder)[:12]}"
        self.created = int(time.time())
        self.open = self.sessions = self.body_bytes = 0
        self.stopping = False
        self.metrics.watch(self)

    def close(self) -> None:
        """Ends the decoding threads and removes the folder. The answerer belongs to whoever made it."""
        self.clips.close()
        shutil.rmtree(self.folder, ignore_errors=True)
