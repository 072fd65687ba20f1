"""`mirasol info`: sizes as a table and as JSON, without the model's memory."""

import json
import re
import sys
from pathlib import Path

import pytest

from mirasol import UserError
from mirasol.cli.info import describe_preset
from mirasol.cli.main import main
from mirasol.config.components import COMPONENTS
from mirasol.config.presets import PRESETS

# For 16 chunks at the preset's resolution and 64 tokens; closed forms once gave those of tiny, 1b and 3b too.
FLOPS = {
    "tiny": 786_991_104, "small": 35_709_255_680, "base": 2_122_977_705_984, "1b": 8_194_080_899_072,
    "3b": 12_950_504_472_576,
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_json_has_what_the_table_shows(preset, capsys, monkeypatch):
    main(["info", preset, "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info.keys() == {"components", "sides", "total", "flops"}
    assert tuple(info["components"]) == COMPONENTS
    for sizes in [*info["components"].values(), *info["sides"].values(), info["total"]]:
        assert sizes.keys() == {"parameters", "paper"}
        assert isinstance(sizes["parameters"], int)
        assert sizes["paper"] is None or isinstance(sizes["paper"], int)
    assert sum(sizes["parameters"] for sizes in info["components"].values()) == info["total"]["parameters"]
    assert sum(info["flops"][name] for name in COMPONENTS) == info["flops"]["total"]
    assert info["flops"]["total"] == FLOPS[preset]
    monkeypatch.setattr("mirasol.cost.counting.count_flops", lambda *_: dict.fromkeys(COMPONENTS, 10**9))
    main(["info", preset])
    table = capsys.readouterr().out
    for name, sizes in [*info["components"].items(), *info["sides"].items()]:
        [line] = [line for line in table.splitlines() if line.startswith(f"{name}  ")]
        assert f"{sizes['parameters']:,}" in line


def test_sums_that_the_supplement_states_are_shown_next_to_it(capsys):
    """ "About 1.3B" of text and "a bit over 1.5B" of the video side, to which its own items do not add up."""
    main(["info", "3b", "--json"])
    info = json.loads(capsys.readouterr().out)
    parameters = {name: sizes["parameters"] for name, sizes in info["components"].items()}
    text, video = info["sides"]["text side"], info["sides"]["video side"]
    assert text["paper"] == 1_300_000_000 and video["paper"] == 1_500_000_000
    assert text["parameters"] == parameters["text"] + parameters["cross_attention"]
    assert abs(text["parameters"] / text["paper"] - 1) < 0.02
    beside = ("text", "cross_attention", "vocabulary", "audio", "contrastive")
    assert video["parameters"] == sum(number for name, number in parameters.items() if name not in beside)
    main(["info", "3b"])
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "1,300.0M" in lines["text side"] and "-1.7%" in lines["text side"]
    assert "1,500.0M" in lines["video side"] and "-30.8%" in lines["video side"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_preset_takes_little_memory(capsys):
    def kibibytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = kibibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    main(["info", "3b", "--json"])
    assert kibibytes("VmHWM") - before < 2**20


def test_frames_resolution_and_text_length_change_the_work():
    base, _ = describe_preset("tiny", 64, 32, 64)
    assert base["flops"] == describe_preset("tiny", None, None, 64)[0]["flops"]
    for arguments, component in (((128, 32, 64), "vit"), ((64, 64, 64), "tubes"), ((64, 32, 128), "vocabulary")):
        assert describe_preset("tiny", *arguments)[0]["flops"][component] > base["flops"][component]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("3c", None, None, 64), "unknown preset '3c': did you mean '3b'"),
        (("3b", 12, None, 64), "--frames 12: must be a multiple of video.frames_per_chunk=8"),
        (("3b", None, 10, 64), "does not fit a chunk of 8 frames x 10 pixels"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        describe_preset(*arguments)
