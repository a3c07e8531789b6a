"""A transformers model without weights, its layers filled and emptied one at a time from a checkpoint of any format."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bstack.errors import ModelWarning, UnsupportedModelError, of_the_machine, one_line
from bstack.memory.process import give_back_freed_memory, no_large_blocks_in_heaps
from bstack.models.code import Code
from bstack.models.plain import plain_generation, plain_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bstack.models.original import OriginalFile

__all__ = ["Checkpoint", "Skeleton", "check_complete", "check_finite", "find_layers", "layer_parameters", "listed"]
__all__ += ["longest_text", "owner_of", "parameters_on_meta", "quiet_transformers", "untie", "zeros_for_weights"]

LARGEST = torch.finfo(torch.float16).max
# Of parameters on their way to a device.
PIECE_BYTES = 2**30


class Checkpoint(ABC):
    """An original model on disk, read a few parameters at a time."""

    name: str  # what a user calls the model: the folder's name, the hub id, the file's name
    config: Any  # transformers.PretrainedConfig
    size_bytes: int  # of the weight files
    quantisation: str | None = None  # of most weights, such as Q4_1; None for floats
    beside: Path  # the folder with generation settings
    code: Code | None = None  # that the model needs and the user allows to run
    untied = False  # `bind` found tied parameters with values of their own

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Describe the source in plain JSON values: format, file names, sizes and digests."""

    @abstractmethod
    def export_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, if there is one, into a folder that holds config.json."""

    @abstractmethod
    def bind(self, model: PreTrainedModel) -> None:
        """Match the tensors with the parameters of `model` (on the meta device), as `check_complete`."""

    @abstractmethod
    def load(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """Fill the named parameters and buffers of the bound `model`, each in its floating type; then `check_finite`.

        The caller may write to that memory: the next load does not see it.
        """

    @abstractmethod
    def originals(self, model: PreTrainedModel) -> list[OriginalFile]:
        """Return the files of weights of the bound `model`, byte for byte; of a quantised source those of its values in float32."""

    @abstractmethod
    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the checkpoint stores a parameter; a container stores plain copies in the same."""


class Skeleton:
    """The module tree of a causal language model, parameters on the meta device until they are loaded.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode, no gradients for parameters.
    layers : list of (str, nn.Module)
        The repeated layers with their full names, in the order of the module list.
    input_name, output_name : str
        Full parameter names of the token embedding and of the head; equal when they are tied.
    device : torch.device
        Where parameters are loaded to; the CPU until `move`.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        When transformers has no causal language model for the configuration, or no repeated layers are found.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.device = torch.device("cpu")
        self.model: Any = _build(checkpoint)
        give_back_freed_memory()
        self.model.eval().requires_grad_(False)
        plain_outputs(self.model)
        plain_generation(self.model)
        checkpoint.bind(self.model)
        # Parameters that are others under a second name -> those others.
        self._tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        prefix, layers = find_layers(self.model)
        self.layers = [(f"{prefix}.{i}", layer) for i, layer in enumerate(layers)]
        names = {id(p): name for name, p in reversed(list(self.model.named_parameters(remove_duplicate=False)))}
        own = names[id(self.model.get_input_embeddings().weight)]
        self.input_name = self._tied.get(own, own)
        head = self.model.get_output_embeddings()
        own = self.input_name if head is None else names[id(head.weight)]
        self.output_name = self._tied.get(own, own)

    def move(self, device: torch.device) -> None:
        """Load parameters to another device from now on, and move the buffers there."""
        self.device = device
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    @property
    def outside_names(self) -> list[str]:
        """Return the state-dict names outside the repeated layers, without tied copies."""
        inside = tuple(name + "." for name, _ in self.layers)
        return [name for name in _untied_names(self.model) if not name.startswith(inside)]

    @property
    def rest_names(self) -> list[str]:
        """Return the outside names without the embedding and the head, which are large and needed only for a moment."""
        return [name for name in self.outside_names if name not in (self.input_name, self.output_name)]

    def layer_names(self, index: int) -> list[str]:
        """Return the full state-dict names that one repeated layer needs, with those that it shares with another layer."""
        prefix, layer = self.layers[index]
        names = (f"{prefix}.{name}" for name in layer.state_dict())
        return list(dict.fromkeys(self._tied.get(name, name) for name in names))

    def own_layer_names(self, index: int) -> list[str]:
        """Return the full state-dict names of one repeated layer, without those that it has from another layer."""
        return [name for name in self.layer_names(index) if name.startswith(self.layers[index][0] + ".")]

    def parameter(self, name: str) -> torch.Tensor:
        """Return the parameter or buffer of that full name."""
        return getattr(*owner_of(self.model, name))

    @contextmanager
    def loaded(
        self, names: Iterable[str], dtype: torch.dtype = torch.float32, *, unread: Container[str] = ()
    ) -> Iterator[None]:
        """Hold the named parameters in memory for the length of a `with` block, as `dtype`; buffers stay as they are.

        Those in `unread` are not read: they are float32 memory that holds anything, for the caller to write.
        """
        names = list(dict.fromkeys(self._tied.get(name, name) for name in names))
        try:
            if dtype != torch.float32:
                self._empty(names, dtype)  # a weight that is read takes the type of the one it replaces
            with quiet_transformers():
                for some in self._pieces([name for name in names if name not in unread]):
                    self.checkpoint.load(self.model, some)
                    self._place(some)
            for name in (name for name in names if name in unread):
                owner, leaf = owner_of(self.model, name)
                empty = torch.empty(self.parameter(name).shape, device=self.device)
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
            self.model.requires_grad_(False)
            self._tie()
            yield
        finally:
            self._empty(names, torch.float32)
            self._tie()
            give_back_freed_memory()

    def _pieces(self, names: list[str]) -> Iterator[list[str]]:
        """Yield names to load at a time: all, or for a device a few, so that memory does not hold the whole model on its way there."""
        size, first = 0, 0
        for number, name in enumerate(names):
            size += self.parameter(name).nbytes
            if self.device.type != "cpu" and size > PIECE_BYTES:
                yield names[first : number + 1]
                size, first = 0, number + 1
        yield names[first:]

    def _place(self, names: Iterable[str]) -> None:
        """Move what was just loaded to the device."""
        if self.device.type == "cpu":
            return
        for owner, leaf in (owner_of(self.model, name) for name in names):
            if (parameter := owner._parameters.get(leaf)) is not None:
                owner._parameters[leaf] = nn.Parameter(parameter.data.to(self.device), requires_grad=False)
            elif (buffer := owner._buffers.get(leaf)) is not None:
                owner._buffers[leaf] = buffer.to(self.device)

    def _tie(self) -> None:
        # What was just loaded takes the place of one of the names of a tied parameter.
        for target, source in self._tied.items():
            owner, leaf = owner_of(self.model, target)
            owner._parameters[leaf] = self.model.get_parameter(source)
        if self.output_name == self.input_name and self.model.get_output_embeddings() is not None:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight

    def _empty(self, names: Iterable[str], dtype: torch.dtype) -> None:
        for owner, leaf in (owner_of(self.model, name) for name in names):
            if (parameter := owner._parameters.get(leaf)) is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)


@contextmanager
def zeros_for_weights(skeleton: Skeleton) -> Iterator[None]:
    """Let a skeleton load zeros in place of its weights, for the length of a `with` block; buffers stay as they are."""
    checkpoint = skeleton.checkpoint
    skeleton.checkpoint = _Zeros(skeleton.model, skeleton.device)  # type: ignore[assignment]
    try:
        yield
    finally:
        skeleton.checkpoint = checkpoint


class _Zeros:
    """Stands in for a checkpoint. All weights are views of one array of zeros, which takes no memory until it is written to."""

    def __init__(self, model: nn.Module, device: torch.device):
        # At places of their own, since product watching tells weights apart by their address.
        self._places = {name: 64 * number for number, name in enumerate(model.state_dict())}
        largest = max(parameter.numel() * 4 for parameter in model.parameters())
        size = largest + 64 * len(self._places)
        on_cpu = device.type == "cpu"  # where numpy asks for pages that the system fills at their first use
        self._bytes = (
            torch.from_numpy(np.zeros(size, np.uint8))
            if on_cpu
            else torch.zeros(size, dtype=torch.uint8, device=device)
        )

    def load(self, model: nn.Module, names: Iterable[str]) -> None:
        for name in names:
            owner, leaf = owner_of(model, name)
            if (parameter := owner._parameters.get(leaf)) is not None:
                start = self._places[name]
                raw = self._bytes[start : start + parameter.numel() * parameter.dtype.itemsize]
                owner._parameters[leaf] = nn.Parameter(raw.view(parameter.dtype).view(parameter.shape), False)


def longest_text(config: Any) -> int | None:
    """Return how many tokens a model reads at most; None where its configuration names no limit, or -1 as XLNet's."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the progress bars that transformers draws for every few tensors."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _build(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(checkpoint.config)  # transformers changes it, and so does the skeleton
    for field in ("quantization_config", "quantization"):  # the latter is MLX's
        if (quantised := getattr(config, field, None)) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise UnsupportedModelError(
                f"{checkpoint.name} is already quantised ({method or 'no method named'}), as its config.json says ({field}). "
                "bstack needs the weights before quantisation.",
                hint=f"If they are floats, as after a merge, remove {field} from config.json.",
            )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{checkpoint.name} is an encoder-decoder ({config.model_type}); bstack compresses causal language models."
        )
    try:
        with parameters_on_meta(), no_large_blocks_in_heaps():
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                trust_remote_code=checkpoint.code is not None,
                experts_implementation="eager",
            )
    except Exception as error:  # constructors raise anything for wrong sizes, division by zero too
        if of_the_machine(error):
            raise
        raise UnsupportedModelError(
            f"{checkpoint.name} ({config.model_type}) is not a causal language model that this transformers "
            f"can build: {one_line(error)}",
            hint=None
            if config.get_text_config() is config
            else "Give its language model alone, saved as a model of its own.",
        ) from None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create parameters without memory, but keep buffers real: rotary tables are computed while building.

    Modules that another thread builds at the same time are left alone.
    """
    thread = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter.device.type == "meta":
            return None
        return type(parameter)(parameter.data.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # torch's type lacks the result
    try:
        yield
    finally:
        hook.remove()


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find a model's repeated layers and their full name: of the outermost module lists that with the most parameters.

    Lists of another length than the configuration names for text, such as an encoder of images, come after. A model without such a list is refused with an UnsupportedModelError.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(other + ".") for _, other, _ in found):
            size = sum(math.prod(p.shape) for p in module.parameters())
            found.append((size, name, module))
    config = getattr(model, "config", None)
    expected = None if config is None else getattr(config.get_text_config(), "num_hidden_layers", None)
    size, name, layers = max(found, key=lambda f: (len(f[2]) == expected, f[0]), default=(0, "", nn.ModuleList()))
    if not size:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of repeated layers, so there is nothing to stream and compress."
        )
    return name, layers


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter or buffer, and the name in it."""
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _untied_names(model: Any) -> list[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return [name for name in model.state_dict() if name not in tied]


def untie(model: Any) -> None:
    """Give tied parameters on the meta device tensors of their own, and have the configurations say so."""
    for target in model.all_tied_weights_keys:
        owner, leaf = owner_of(model, target)
        owner._parameters[leaf] = nn.Parameter(torch.empty_like(getattr(owner, leaf)), requires_grad=False)
    for module in model.modules():
        if getattr(module, "all_tied_weights_keys", None):
            module.all_tied_weights_keys = {}
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def listed(names: Iterable[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_complete(model: nn.Module, source: str, found: Container[str], unused: Iterable[str] = ()) -> None:
    """Refuse a source without all parameters of the model with an UnsupportedModelError that names some, and `unused` tensors."""
    if missing := [name for name in _untied_names(model) if name not in found]:
        raise UnsupportedModelError(
            f"{source}: the checkpoint lacks {listed(missing)}, which {type(model).__name__} needs"
            + (f"; it holds {listed(unused)} instead. " if unused else ". ")
            + "Is its configuration, such as config.json, the one that belongs to these weights?"
        )


def check_finite(model: nn.Module, names: Iterable[str], source: str) -> None:
    """Refuse NaN, infinity, and weights beyond half precision in parameters just loaded from `source` with an UnsupportedModelError.

    Matrices of zeros alone may be meant: a warning names them, once.
    """
    known = model.__dict__.setdefault("bstack_zeros", set())
    zeros: list[str] = []
    for name in names:
        tensor: Any = getattr(*owner_of(model, name))
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = tensor.detach().aminmax()
        largest = max(-float(low), float(high))  # NaN if the tensor has one, in either place
        if not (math.isfinite(float(low)) and math.isfinite(largest)):
            bad = int((~tensor.isfinite()).sum())
            raise UnsupportedModelError(
                f"{source}: {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}. "
                "Such a model cannot be calibrated; check the checkpoint it came from."
            )
        if isinstance(tensor, nn.Parameter) and largest > LARGEST:
            raise UnsupportedModelError(
                f"{source}: {name} holds weights up to {largest:.3g}, but blocks keep their scales in half precision, "
                f"which ends at {LARGEST:g}.",
                hint="Check the checkpoint it came from.",
            )
        if largest == 0 and low == 0 and tensor.dim() > 1 and isinstance(tensor, nn.Parameter) and name not in known:
            zeros.append(name)
    if zeros:
        known.update(zeros)
        warnings.warn(
            f"Zeros alone are in {listed(zeros)}, as in files that were not fetched whole. If that is not meant, compare their "
            "SHA-256 with those that the source lists.",
            ModelWarning,
            stacklevel=4,
        )


def layer_parameters(skeleton: Skeleton, index: int) -> dict[str, torch.Tensor]:
    """Return the loaded parameters of a layer that may be linears: those of two or three dimensions, by full name."""
    return {
        name: tensor
        for name in skeleton.own_layer_names(index)
        if (tensor := skeleton.parameter(name)).dim() in (2, 3) and tensor.is_floating_point()
    }
