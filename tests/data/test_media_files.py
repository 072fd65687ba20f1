"""What files are, told by their content, and members of tars as media."""

import io
import tarfile

import pytest

from mirasol.data.media_files import (
    find_stored_file,
    has_wrong_extension,
    open_media_file,
    read_member,
    read_tar_index,
    split_member_path,
)
from mirasol.errors import BadClip


def test_an_extension_is_compared_with_the_content():
    assert has_wrong_extension("a.mp4", "matroska")
    assert not has_wrong_extension("a.MKV", "matroska")
    assert not has_wrong_extension("a.xyz", "")


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shards" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.mp4", b"film" * 300), ("a.txt", b"words")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_member_can_be_opened_as_a_file_that_goes_away(shard, tmp_path):
    with open_media_file(tmp_path, "shards/00000.tar/a.mp4") as path:
        assert path.read_bytes() == b"film" * 300
        assert path.suffix == ".mp4"
    assert not path.exists()
    assert read_member(shard, "a.mp4", 6) == b"filmfi"
    assert find_stored_file(tmp_path, "shards/00000.tar/a.mp4") == shard
    with pytest.raises(BadClip, match="has no member b.mp4"), open_media_file(tmp_path, "shards/00000.tar/b.mp4"):
        pass
    with pytest.raises(BadClip, match="no such file"), open_media_file(tmp_path, "shards/1.tar/b.mp4"):
        pass


def test_a_folder_may_be_called_like_a_tar(tmp_path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.mp4").write_bytes(b"film")
    with open_media_file(tmp_path, "x.tar/a.mp4") as path:
        assert path == tmp_path / "x.tar" / "a.mp4"
    assert split_member_path("x.tar/a.mp4") == ("x.tar", "a.mp4")
    assert split_member_path("x/a.mp4") is None


@pytest.mark.parametrize(
    ("length", "members"), [(700, set()), (1800, {"a.mp4"}), (2300, {"a.mp4"}), (2600, {"a.mp4", "a.txt"})]
)
def test_a_tar_cut_anywhere_says_so_and_gives_whole_members_alone(shard, length, members):
    whole = shard.read_bytes()
    assert read_tar_index(shard).cut == ""
    shard.write_bytes(whole[:length])
    index = read_tar_index(shard)
    assert index.cut
    assert set(index.members) == members
    shard.write_bytes(b"no tar")
    with pytest.raises(BadClip, match="not a tar file"):
        read_tar_index(shard)
