"""Naming what somebody gave us instead of a ``.bstk`` file."""

from __future__ import annotations

import struct

HEAD = 512
"""How many bytes of the start are looked at."""


def describe(head: bytes) -> str:
    """Say what a file that starts with `head` seems to be, and what to do about it."""
    if not head:
        return "the file is empty. Copy or download it again."
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"\x89BSTK\n", b"\x89BSTK\r\r\n", b"\tBSTK", b"\xc2\x89BSTK", b"\xef\xbf\xbdBSTK")):
        return "this was a .bstk file, broken by a transfer as text. Transfer it as binary."
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "this is a git-lfs pointer, not the file it points to. Run: git lfs pull"
    if text[:15].lower().startswith((b"<!doctype html", b"<html", b"<head")) or text.startswith(b"<?xml"):
        return "this is a web page (HTML), not a .bstk file: the download ended at an error or log-in page."
    if head.startswith(b"GGUF"):
        return "this is a GGUF file, not a .bstk file. To make one of it: bstack compress FILE -o OUT.bstk"
    if head.startswith(b"PK\x03\x04"):
        return "this is a zip archive (or a PyTorch .bin/.pt file), not a .bstk file."
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh")):
        return "this is a compressed file, not a .bstk file. Unpack it first."
    if len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack_from("<Q", head)[0] < 2**30:
        return (
            "this is a safetensors file, not a .bstk file. To make one: bstack compress FOLDER -o OUT.bstk, with the "
            "folder it is in."
        )
    if text.startswith((b"{", b"[")):
        return "this is JSON, not a .bstk file."
    if _is_text(head):
        return f"this is text, not a .bstk file. It starts with {head[:40]!r}."
    return f"this is not a .bstk file: it starts with {head[:8].hex(' ')}, not with 89 42 53 54 4b 0d 0a 1a."


def _is_text(head: bytes) -> bool:
    try:
        text = head[: HEAD - 4].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n" for character in text)
