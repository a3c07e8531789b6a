"""One codec a file. A codec turns a matrix into blocks and back; this is the registry."""

from __future__ import annotations

import bstk
from bstack.codecs.contract import Block, Codec
from bstack.codecs.sign import SignCodec
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.trellis import TrellisCodec
from bstack.errors import CodecError
from bstack.settings import Settings

__all__ = ["CODECS", "Block", "Codec", "codec_of_kind", "make_codec"]

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (TrellisCodec, SignCodec, SpqrCodec)}
_OF_KIND = {kind: codec for codec in CODECS.values() for kind in codec.kinds}


def codec_of_kind(kind: bstk.Kind) -> type[Codec]:
    """The codec that rebuilds stacks which begin with this chunk kind.

    Raises
    ------
    KeyError
        For a kind that no stack begins with; the container's reader refuses such files first.
    """
    return _OF_KIND[kind]


def make_codec(settings: Settings) -> Codec:
    """The encoder that the settings ask for.

    Raises
    ------
    bstack.errors.CodecError
        For a name that is no codec's, or a setting that the codec does not allow.
    """
    if settings.codec not in CODECS:
        raise CodecError(f"codec is {settings.codec!r}; allowed are {', '.join(CODECS)}.")
    return CODECS[settings.codec].from_settings(settings)
