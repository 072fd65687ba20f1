import errno
import os

import pytest

from mirasol.errors import UserError
from mirasol.files import lock_file, write_file_atomically, write_folder_atomically
from mirasol.json_values import parse_own_json


def test_what_is_written_replaces_what_was_there(tmp_path):
    write_file_atomically(tmp_path / "a.json", "first")
    write_file_atomically(tmp_path / "a.json", "second")
    assert (tmp_path / "a.json").read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    write_file_atomically(tmp_path / "a.json", "first")

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("mirasol.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file_atomically(tmp_path / "a.json", "second")
    assert (tmp_path / "a.json").read_text() == "first"


def test_new_text_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """Or a power cut could leave the name and nothing behind it."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(f"mirasol.files.os.{name}", lambda *given, n=name, f=real: (done.append(n), f(*given)))
    write_file_atomically(tmp_path / "a.json", "first")
    assert done == ["fsync", "replace"]


def test_damaged_json_is_one_line_with_its_place():
    assert parse_own_json('{"a": 1}', "b.json", "remove it") == {"a": 1}
    with pytest.raises(UserError, match=r"^b\.json: is damaged \(.*\): remove it$"):
        parse_own_json('{"a": ', "b.json", "remove it")


def test_a_folder_has_its_name_only_once_it_is_complete(tmp_path):
    def fill(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("text")
        assert not (tmp_path / "new").exists()

    write_folder_atomically(tmp_path / "new", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "deep" / "a.txt").read_text() == "text"


def test_after_an_error_nothing_of_a_folder_remains(tmp_path):
    def fill(folder):
        (folder / "a.txt").write_text("text")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(tmp_path / "new", fill)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_not_part_of_the_folder(tmp_path):
    (tmp_path / ".new.unfinished" / "old").mkdir(parents=True)
    write_folder_atomically(tmp_path / "new", lambda folder: (folder / "a.txt").write_text("text"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_only_on_request(tmp_path):
    write_folder_atomically(tmp_path / "new", lambda folder: (folder / "a.txt").write_text("first"))
    with pytest.raises(UserError, match="new: already exists and is not empty: give another folder"):
        write_folder_atomically(tmp_path / "new", lambda folder: (folder / "a.txt").write_text("second"))
    assert (tmp_path / "new" / "a.txt").read_text() == "first"
    write_folder_atomically(tmp_path / "new", lambda folder: (folder / "b.txt").write_text("second"), replace=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    def fill(folder):
        (folder / "a.txt").write_text("first")
        with pytest.raises(UserError, match="another process is writing this folder"):
            write_folder_atomically(tmp_path / "new", lambda other: (other / "b.txt").write_text("second"))

    write_folder_atomically(tmp_path / "new", fill)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def refuse_locks(monkeypatch, number: int) -> None:
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_a_lock_keeps_others_out_and_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as other:
        assert lock_file(one.fileno())
        with pytest.raises(BlockingIOError):
            lock_file(other.fileno())
        for number in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            refuse_locks(monkeypatch, number)
            assert not lock_file(other.fileno())
        refuse_locks(monkeypatch, errno.EBADF)
        with pytest.raises(OSError, match="Bad file descriptor"):
            lock_file(other.fileno())
