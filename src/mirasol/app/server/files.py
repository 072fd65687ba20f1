"""Uploaded files: each is written under a random name into the server's folder, and removed with it."""

import asyncio
import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mirasol.app.server.messages import MediaPart
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
PIECE = 2**20


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file. name: what the client calls it, which is never used as a path. kind: video (also of files with
    sound alone) or image."""

    id: str
    name: str
    kind: str
    purpose: str
    digest: str
    path: Path
    size: int
    created: int

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API describes files."""
        return {
            "id": self.id, "object": "file", "bytes": self.size, "created_at": self.created, "filename": self.name,
            "purpose": self.purpose, "status": "processed",
        }  # fmt: skip


class FileStore:
    """The uploaded files of a server, in a folder of its own. Of one event loop."""

    def __init__(self, folder: Path, caps: Caps):
        self.folder, self.caps, self.nbytes = folder, caps, 0
        self._files: dict[str, StoredFile] = {}

    def __len__(self) -> int:
        return len(self._files)

    def list(self) -> list[StoredFile]:
        """All files, the newest first."""
        return sorted(self._files.values(), key=lambda file: (-file.created, file.id))

    async def add(self, source: BinaryIO, size: int, name: str, purpose: str, kind: str) -> StoredFile:
        """Keeps a copy of `source`. Raises Refusal: 413 where it does not fit, 429 for one file too many."""
        if len(self._files) >= self.caps.max_files:
            most = f"{len(self._files)} files are stored, which is the limit: delete some"
            raise Refusal(429, most, "too_many_files", "file")
        if self.nbytes + size > self.caps.max_stored:
            full = f"a file of {size} bytes would exceed the {self.caps.max_stored} bytes of all files: delete some"
            raise Refusal(413, full, "storage_full", "file")
        self.nbytes += size  # before the copying, during which others may come
        number = secrets.token_hex(16)
        path = self.folder / f"file-{number}"
        try:
            digest = await asyncio.to_thread(_copy, source, path)
        except BaseException:
            self.nbytes -= size
            path.unlink(missing_ok=True)
            raise
        file = StoredFile(f"file-{number}", name, kind, purpose, digest, path, size, int(time.time()))
        self._files[file.id] = file
        return file

    def get(self, number: str) -> StoredFile:
        """The file of this id. Raises Refusal (404)."""
        file = self._files.get(number) if FILE_ID.fullmatch(number) else None
        if file is None:
            raise Refusal(404, "no such file: upload it with POST /v1/files", "file_not_found", "file_id")
        return file

    async def find_part(self, number: str) -> MediaPart:
        """A file as a part of a clip."""
        file = self.get(number)
        return MediaPart(file.kind, file.digest, path=file.path)

    def delete(self, number: str) -> StoredFile:
        """Removes a file. Raises Refusal (404)."""
        file = self.get(number)
        del self._files[file.id]
        self.nbytes -= file.size
        file.path.unlink(missing_ok=True)
        return file


def _copy(source: BinaryIO, path: Path) -> str:
    digest = hashlib.sha256()
    source.seek(0)
    with path.open("xb") as target:
        while piece := source.read(PIECE):
            target.write(piece)
            digest.update(piece)
    return digest.hexdigest()
