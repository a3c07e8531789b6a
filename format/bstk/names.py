"""What a chunk may be called."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Written out rather than taken from the Unicode database, which changes: controls, line and paragraph separators, and
# the bidirectional overrides that make a terminal show another name than the one that is there.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def check_name(name: str, file: bool = False) -> None:
    """Check the characters of a name; with `file`, also that it is safe to create as a file inside some folder.

    Raises
    ------
    ValueError
        It is not allowed; the message says what is wrong.
    """
    bad = _FORBIDDEN.search(name)
    if bad:
        raise ValueError(f"the name {name!r} has the control character U+{ord(bad[0]):04X}")
    if file:
        # A colon would name a drive or a stream on Windows, a backslash a folder.
        if "\\" in name or ":" in name:
            raise ValueError(f"the file name {name!r} has a backslash or a colon")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"the file name {name!r} is not a plain relative path")


def first_twice(names: Iterable[str]) -> str:
    """Return the first name that appears a second time; there must be one."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))
