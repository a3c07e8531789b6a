"""Compress on an NVIDIA GPU: find it and its kernels, encode on it, and say in words what it lacks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from bstack.codecs import Codec
from bstack.errors import device_failed, device_full, one_line
from bstack.kernels.encode import use_device
from bstack.packed.backends import device_kernels, device_of
from bstk.errors import BstkError, Interrupted, ResourceError, UsageError

__all__ = ["Device", "check_encoder", "device_name"]


class Device:
    """A GPU, ``cuda`` or ``cuda:N``, that encodes one matrix after the other; a context manager.

    Its errors in a ``with`` block become a ResourceError if its memory is full, Interrupted if it failed or was lost.

    Raises
    ------
    bstk.BstkError
        torch finds no such GPU or cannot use it, or the packages that compile its kernels are missing.
    """

    def __init__(self, name: str):
        self.device = device_of(name, packed=False)
        with self:
            use_device(self.device, _kernels(self.device.index))

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, BstkError):
            return
        if device_failed(error):
            raise Interrupted(
                f"{self.device} failed or was lost: {one_line(error)}.",
                hint="Finished layers are kept: when nvidia-smi shows the GPU again, give the same command to continue.",
            ) from error
        if device_full(error):
            raise ResourceError(
                f"The memory of {self.device} is full: {one_line(error)}",
                hint="Finished layers are kept: end what else uses the GPU (nvidia-smi shows it), and give the same command to "
                "continue.",
            ) from error

    def max_pending(self, _inputs: int, /) -> int:
        """Return 1: a matrix at a time."""
        return 1

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> _Done:
        """Call a function now."""
        return _Done(function(*arguments))


class _Done:
    """A matrix that is encoded."""

    def __init__(self, found: Any):
        self._found = found

    def result(self) -> Any:
        """Return what the function did."""
        return self._found

    def cancel(self) -> None:
        """Do nothing."""


def check_encoder(codec: Codec, device: torch.device) -> None:
    """Refuse a codec that does not encode on a device."""
    if device.type != "cpu" and codec.name != "trellis":
        raise UsageError(
            f"device is {device} and the codec {codec.name}; the trellis codec alone encodes on a GPU.", option="device"
        )


def device_name(device: torch.device) -> str:
    """Return what a file records of a device: other GPUs make other files."""
    return device.type if device.type == "cpu" else f"{device.type} ({torch.cuda.get_device_name(device)})"


def _kernels(index: int) -> Any:
    if not (importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core")):
        raise BstkError(
            "Compressing on a GPU needs the package cuda-core, which compiles its kernels.",
            hint="Run pip install 'bstack[compress,cuda]'.",
            option="device",
        )
    return device_kernels(index)
