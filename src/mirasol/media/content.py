"""What a file is by its first bytes; names and extensions lie."""

import re

PAGE = "an HTML page: its download failed"
# What a file begins with, by the name its kind goes by. Downloads that failed are pages; extensions lie.
_BEGINNINGS = {
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),
    "mp4": re.compile(rb".{4}(ftyp|moov|mdat|free|skip|wide)", re.DOTALL),
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
    "wav": re.compile(rb"RIFF.{4}WAVE", re.DOTALL),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "gif": re.compile(rb"GIF8"),
    "flac": re.compile(rb"fLaC"),
    "ogg": re.compile(rb"OggS"),
    "html": re.compile(rb"\s*(?:<!--.*?-->\s*)*<(!doctype\s+html|html|head|\?xml)", re.IGNORECASE | re.DOTALL),
}


def detect_content_kind(beginning: bytes) -> str:
    """What the first 512 bytes of a file show it to be ("html", "mp4", "matroska", "jpeg", …); "" for none known."""
    return next((kind for kind, pattern in _BEGINNINGS.items() if pattern.match(beginning)), "")
