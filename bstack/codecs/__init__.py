"""One codec a file. A codec turns a matrix into blocks and back; this is the registry."""

from __future__ import annotations

from bstack.codecs.contract import Block, Codec
from bstack.codecs.sign import SignCodec

__all__ = ["CODECS", "Block", "Codec", "codec_of_kind"]

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (SignCodec,)}


def codec_of_kind(kind: int) -> type[Codec]:
    """The codec that rebuilds stacks which begin with this chunk kind.

    Raises
    ------
    KeyError
        For a kind that is no codec's; the container's reader refuses such files first.
    """
    return next(codec for codec in CODECS.values() if kind in codec.kinds)
