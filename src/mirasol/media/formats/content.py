"""What a file is by its first bytes: names and extensions may be wrong."""

import os
import re
from pathlib import Path

PAGE = "an HTML page: its download failed"
# How files of each kind begin. Failed downloads are HTML pages, whatever their extension.
_BEGINNINGS = {
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),
    "mp4": re.compile(rb".{4}(ftyp|moov|mdat|free|skip|wide)", re.DOTALL),
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
    "wav": re.compile(rb"RIFF.{4}WAVE", re.DOTALL),
    "webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "gif": re.compile(rb"GIF8"),
    "bmp": re.compile(rb"BM.{8}[\x1a-\xff]\0\0\0", re.DOTALL),
    "tiff": re.compile(rb"II\*\0|MM\0\*"),
    "flac": re.compile(rb"fLaC"),
    "ogg": re.compile(rb"OggS"),
    "amr": re.compile(rb"#!AMR"),
    "pdf": re.compile(rb"%PDF-"),
    "zip": re.compile(rb"PK\x03\x04"),
    "gzip": re.compile(rb"\x1f\x8b"),
    "rar": re.compile(rb"Rar!\x1a\x07"),
    "7z": re.compile(rb"7z\xbc\xaf\x27\x1c"),
    "midi": re.compile(rb"MThd"),
    "flash": re.compile(rb"[FCZ]WS[\x01-\x40]"),
    "realmedia": re.compile(rb"\.RMF"),
    "ape": re.compile(rb"MAC "),
    "nut": re.compile(rb"nut/multimedia container"),
    "html": re.compile(rb"\s*(?:<!--.*?-->\s*)*<(!doctype\s+html|html|head|\?xml)", re.IGNORECASE | re.DOTALL),
}
# Kinds that are not read as video or sound, as people call them.
OTHER_FORMATS = {
    "webp": "WebP image",
    "jpeg": "JPEG image",
    "png": "PNG image",
    "bmp": "BMP image",
    "tiff": "TIFF image",
    "pdf": "PDF document",
    "zip": "ZIP archive",
    "gzip": "gzip archive",
    "rar": "RAR archive",
    "7z": "7-Zip archive",
    "midi": "MIDI file",
    "flash": "Flash file",
    "realmedia": "RealMedia file",
    "ape": "Monkey's Audio file",
    "nut": "NUT file",
}


def detect_content_kind(beginning: bytes) -> str:
    """What the first 512 bytes of a file show it to be ("html", "mp4", "matroska", "jpeg", …); "" for none known."""
    return next((kind for kind, pattern in _BEGINNINGS.items() if pattern.match(beginning)), "")


def has_several_stills(path: str | os.PathLike) -> bool:
    """Whether a JPEG file is one of cameras' that hold one picture in several sizes or depths (CIPA DC-007, "MPF")."""
    with Path(path).open("rb") as stream:
        return b"MPF\0" in stream.read(2**17)
