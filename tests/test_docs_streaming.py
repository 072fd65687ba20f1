"""docs/streaming.md says what is true: its example runs, its sizes are those of a stream."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration

PAGE = (Path(__file__).parents[1] / "docs" / "streaming.md").read_text(encoding="utf-8")
ROWS = {
    line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
    for line in PAGE.splitlines()
    if line.startswith("| ")
}
SHALLOW = {"vit": {"depth": 1}, "audio": {"adapter": {"depth": 1}}, "reconstruction": {"stack": {"depth": 1}}}


def test_its_example_runs(shapes, tmp_path, monkeypatch):
    clip = sorted((shapes / "clips" / "test").iterdir())[0]
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec(compile(example, "docs/streaming.md", "exec"), names)
    assert len(said.getvalue().splitlines()) == names["clip"]["video"].shape[1] > 1
    whole = names["model"].generate(**names["clip"], **names["question"], max_new_tokens=8)
    assert torch.equal(names["answer"], whole)


def bytes_of(text: str) -> float:
    number, _, unit = text.replace(",", "").partition(" ")
    return float(number) * {"": 1, "B": 1, "MiB": 2**20}[unit]


def said(row: str, preset: str) -> float:
    """Bytes in the table, all rows of that beginning together."""
    column = ["tiny", "1b", "3b"].index(preset)
    return sum(bytes_of(cells[column]) for name, cells in ROWS.items() if name.startswith(row))


@pytest.mark.parametrize("preset", ["tiny", "1b", "3b"])
@pytest.mark.parametrize(
    ("combiner", "row"),
    [
        ({"kind": "transformer"}, "Combiner `transformer`"),
        ({"kind": "cls"}, "Combiner `cls`"),
        ({"kind": "perceiver"}, "Combiner `perceiver`"),
        ({"kind": "cls", "scope": "chunk"}, "any Combiner of the scope `chunk`"),
        ({"kind": "ttm"}, "Combiner `ttm`"),
    ],
)
def test_its_table_of_sizes_is_what_a_stream_keeps(preset, combiner, row, monkeypatch):
    """With a window of one chunk there is room for one. What is encoded how does not matter here."""
    config = MirasolConfig.preset(preset, combiner=combiner, text={"stack": {"depth": 2}}, **SHALLOW)
    video, audio, width = config.video, config.audio, config.combiner.stack.width
    with torch.device("meta"):
        model = MirasolForConditionalGeneration(config).eval()
        model = model if preset == "tiny" else model.to(torch.bfloat16)
        features = tuple(torch.empty(1, 1, part.tokens, width, dtype=model.dtype) for part in (video, audio))
        monkeypatch.setattr(model.chunk_encoder, "forward", lambda *_: features)
        stream = model.stream(window=1)
        stream.append(None, None)
    assert stream.state_bytes["combiner"] == pytest.approx(said(row, preset), rel=0.001)
    assert stream.state_bytes["latent"] == said("latent model", preset)
    assert stream.state_bytes["latents"] == said("x and h", preset)
