"""The registry of codecs, which turn a matrix into blocks and back: one a file."""

from __future__ import annotations

import bstk
from bstack.codecs.contract import Block, Codec
from bstack.codecs.sign import SignCodec
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.trellis import TrellisCodec
from bstack.settings import Settings
from bstk.errors import UsageError

__all__ = ["CODECS", "Block", "Codec", "codec_of_kind", "make_codec"]

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (TrellisCodec, SignCodec, SpqrCodec)}
# By setting: the codecs that have it.
_SETTINGS = {
    name: [codec for codec in CODECS.values() if name in codec.__annotations__]
    for name in ("planes", "rank", "bits", "group", "outliers", "bpw")
}
_OF_KIND = {kind: codec for codec in CODECS.values() for kind in codec.kinds}


def codec_of_kind(kind: bstk.Kind) -> type[Codec]:
    """Return the codec that rebuilds stacks which begin with this chunk kind.

    Raises
    ------
    KeyError
        No stack begins with this kind; the container's reader refuses such files first.
    """
    return _OF_KIND[kind]


def make_codec(settings: Settings) -> Codec:
    """Make the encoder that the settings ask for.

    Raises
    ------
    bstk.UsageError
        There is no codec of that name, it lacks a setting that is given, or does not allow its value.
    """
    if settings.codec not in CODECS:
        raise UsageError(f"codec is {settings.codec!r}; allowed are {', '.join(CODECS)}.")
    codec = CODECS[settings.codec]
    given = {name: value for name in _SETTINGS if (value := getattr(settings, name)) is not None}
    for name, value in given.items():
        if codec not in _SETTINGS[name]:
            owners = " or ".join(owner.name for owner in _SETTINGS[name])
            raise UsageError(
                f"{name} is {value}, but the {codec.name} codec has none; it belongs to the {owners} codec."
            )
    return codec(**given)
