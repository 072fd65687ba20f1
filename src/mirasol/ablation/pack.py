"""What a suite's tables are made from, as one small file: a suite goes on from it where its runs are not.

The answers, logs and identities of all finished runs, without weights, where they lie in the suite's folder: unpacked
there (`tar -xf`), the result is drawn again, and seeds and rows can be added without making a finished run again.
"""

import io
import tarfile
from pathlib import Path

from mirasol.ablation.result import PLAN, SUITE
from mirasol.ablation.runs import ANSWERS, DONE, IDENTITY, STREAM

PACKED = "runs.tar.xz"
_LOG = "train/metrics.jsonl"


def pack_runs(output: Path) -> bytes:
    """A tar file, compressed, of what `collect_result` and `Run.finished` read; the same runs give the same bytes."""
    names = [SUITE, PLAN]
    for done in sorted((output / "runs").glob(f"*/seed-*/{DONE}")):
        folder = done.parent.relative_to(output)
        names += [f"{folder}/{name}" for name in (IDENTITY, DONE, ANSWERS, STREAM, _LOG)]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name in names:
            if (output / name).is_file():
                content = (output / name).read_bytes()
                member = tarfile.TarInfo(name)  # of nobody, of no time
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
