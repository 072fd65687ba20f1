"""Writing one shard: a pure function of its job, whichever process or machine it runs on."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mirasol.data.check import MediaFacts, check_media_file
from mirasol.data.media_files import get_index_path, is_image, open_media_file
from mirasol.data.shards.format import Sample, ShardJob, read_finished_index
from mirasol.errors import BadClip, UserError
from mirasol.files import hash_file, write_file_atomically
from mirasol.media.isolation.decoders import run_isolated
from mirasol.media.limits import DEFAULT_LIMITS
from mirasol.media.transcode import Reencoding, reencode_media

UNFINISHED = ".unfinished"


def write_shard(job: ShardJob, on_sample: Callable[[], None] | None = None) -> dict[str, Any]:
    """Writes a shard's tar and then its index, unless both are there; returns the index.

    The index holds `members` (name → offset, size, SHA-256), `bytes` and `sha256` of the tar, `bad`: the media that
    cannot be read, which are left out, `kept`: those that were not re-encoded, with the reason, and `cut_short`:
    those that are packed although they do not hold all that their header says. The same job gives the same bytes, with
    one version of PyAV where media are re-encoded. An interruption leaves no file under the shard's name.

    Raises:
        UserError: a file that cannot be written or read to its end; shards that were finished before stay.
    """
    found = read_finished_index(job.path)
    if found is not None:
        for _ in job.samples if on_sample is not None else ():
            on_sample()
        return found
    unfinished = None
    try:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{job.path.name}.", suffix=UNFINISHED, dir=job.path.parent)
        unfinished = Path(name)
        with os.fdopen(handle, "wb") as stream:
            held = _write_members(job, stream, on_sample)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.chmod(0o644)  # a temporary file is its owner's alone
        size, digest = unfinished.stat().st_size, hash_file(unfinished)
        index = {"tar": job.path.name, "bytes": size, "sha256": digest, **held}
        os.replace(unfinished, job.path)
        write_file_atomically(get_index_path(job.path), json.dumps(index) + "\n")
    except OSError as error:
        raise UserError(
            f"{job.path}: cannot be written ({error.strerror or error}): mend that and run the same command again, "
            f"finished shards are kept"
        ) from error
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
    return index


def _write_members(job: ShardJob, stream: BinaryIO, on_sample: Callable[[], None] | None) -> dict[str, Any]:
    members, bad, kept, cut_short = {}, [], {}, {}
    settings = Reencoding.parse(job.reencode) if job.reencode else None
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in job.samples:
            facts = check_media_file(Path(job.root), sample.media)
            reason = _find_defect(facts)
            try:
                if reason is None:
                    with _choose_content(Path(job.root), sample, facts, settings) as (path, name, why_kept):
                        members[name] = _add(tar, name, path)
                    if why_kept:
                        kept[sample.media] = why_kept
                    if facts.cut_short:
                        cut_short[sample.media] = facts.cut_short
                    text = json.dumps({"media": sample.media, "examples": sample.rows}) + "\n"
                    members[f"{sample.key}.json"] = _add(tar, f"{sample.key}.json", text.encode())
            except BadClip as error:
                reason = "undecodable", error.reason
            if reason is not None:
                bad.append({"media": sample.media, "kind": reason[0], "reason": reason[1]})
            if on_sample is not None:
                on_sample()
    return {"members": members, "bad": bad, "kept": kept, "cut_short": cut_short}


def _find_defect(facts: MediaFacts) -> tuple[str, str] | None:
    """Kind of problem and reason where a media file cannot be opened, as `mirasol data check` finds them."""
    return ("not media" if facts.kind == "html" else "undecodable", facts.reason) if facts.reason else None


@contextlib.contextmanager
def _choose_content(
    root: Path, sample: Sample, facts: MediaFacts, settings: Reencoding | None
) -> Iterator[tuple[Path, str, str]]:
    """The file that goes into the tar, its name there, and why it was not re-encoded although it should have been."""
    suffix = os.path.splitext(sample.media)[1].lower()
    # Re-encoded, a file that was cut short would pass for a complete one.
    why_kept = "an image" if is_image(sample.media) else "cut short" if facts.cut_short else ""
    with open_media_file(root, sample.media) as path:
        if settings is None or why_kept:
            yield path, sample.key + suffix, why_kept if settings is not None else ""
            return
        with tempfile.TemporaryDirectory(prefix="mirasol-") as folder:
            small = Path(folder) / "small.mp4"
            why_kept = run_isolated(DEFAULT_LIMITS, path, reencode_media, path, small, settings)
            yield (path, sample.key + suffix, why_kept) if why_kept else (small, f"{sample.key}.mp4", "")


class _Hashing(io.RawIOBase):
    """A file that notes the hash of what is read from it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(size)
        self.digest.update(block)
        return block


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes) -> tuple[int, int, str]:
    """Adds a member; returns offset, size and hash. Its header says nothing of time and user: the same bytes always."""
    info = tarfile.TarInfo(name)
    with contextlib.ExitStack() as files:
        stream = io.BytesIO(content) if isinstance(content, bytes) else files.enter_context(content.open("rb"))
        info.size = len(content) if isinstance(content, bytes) else os.fstat(stream.fileno()).st_size
        hashing = _Hashing(stream)
        offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(info, hashing)
    return offset, info.size, hashing.digest.hexdigest()
