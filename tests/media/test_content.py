"""What a file is by its first bytes, and a page saved as media told as one wherever media are opened."""

import pytest

from mirasol import BadClip
from mirasol.media.formats.content import detect_content_kind
from mirasol.media.image import read_image
from mirasol.media.reader import probe_media


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (b"\0\0\0\x18ftypisom", "mp4"),
        (b"\0\0\0\x08mdat", "mp4"),
        (b"\x1a\x45\xdf\xa3\x01", "matroska"),
        (b"RIFF\x10\x20\x0a\x40AVI LIST", "avi"),
        (b"RIFF\x10\x20\x0a\x40WEBPVP8 ", "webp"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"<!DOCTYPE HTML>\n<html>", "html"),
        (b"\n <!-- saved --> <HTML><head>", "html"),
        (b"just words", ""),
        (b"", ""),
    ],
)
def test_content_tells_the_kind(beginning, kind):
    assert detect_content_kind(beginning) == kind


@pytest.mark.parametrize(
    ("name", "opened"), [("a.mp4", probe_media), ("a.jpg", lambda path: read_image(path, image_size=8))]
)
def test_a_page_saved_as_media_is_told_as_one(tmp_path, name, opened):
    path = tmp_path / name
    path.write_text("<!DOCTYPE html><html><body>404 not found</body></html>\n" * 20)
    with pytest.raises(BadClip, match="an HTML page: its download failed"):
        opened(path)
