import pytest

from mirasol.files import write_whole


def test_what_is_written_replaces_what_was_there(tmp_path):
    write_whole(tmp_path / "a.json", "first")
    write_whole(tmp_path / "a.json", "second")
    assert (tmp_path / "a.json").read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "first")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("mirasol.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", "second")
    assert (tmp_path / "a.json").read_text() == "first"
