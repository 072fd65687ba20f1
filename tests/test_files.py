import errno
import os

import pytest

from mirasol.errors import UserError
from mirasol.files import lock, parse_json, write_whole


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


def test_new_text_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """Or a power cut could leave the name and nothing behind it."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(f"mirasol.files.os.{name}", lambda *given, n=name, f=real: (done.append(n), f(*given)))
    write_whole(tmp_path / "a.json", "first")
    assert done == ["fsync", "replace"]


def test_damaged_json_is_one_line_with_its_place():
    assert parse_json('{"a": 1}', "b.json", "remove it") == {"a": 1}
    with pytest.raises(UserError, match=r"^b\.json: is damaged \(.*\): remove it$"):
        parse_json('{"a": ', "b.json", "remove it")


def refuse_locks(monkeypatch, number: int) -> None:
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_a_lock_keeps_others_out_and_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as other:
        assert lock(one.fileno())
        with pytest.raises(BlockingIOError):
            lock(other.fileno())
        for number in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            refuse_locks(monkeypatch, number)
            assert not lock(other.fileno())
        refuse_locks(monkeypatch, errno.EBADF)
        with pytest.raises(OSError, match="Bad file descriptor"):
            lock(other.fileno())
