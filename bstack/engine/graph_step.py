"""Steps of transformers models on a GPU as CUDA graphs: one token of each of some texts runs as one launch.

A model runs its own code until two steps in a row differ in values alone. The second is recorded: inputs go into tensors that stay,
keys and values lie in buffers that stay (`bstack.models.kv_cache.FixedLayer`), and the kernels read the blocks' addresses in
device memory, so a resize asks for no new recording. Whether all that is right is tried once, at `install`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from bstack.engine.generate import decoding
from bstack.engine.graphs import record, run_and_look_for_waits, warn_not_recorded
from bstack.errors import SlowerWarning, of_the_machine, one_line
from bstack.models.kv_cache import FixedLayer, cache_argument, fix, forward_by_names
from bstack.models.plain import plain_outputs
from bstack.packed.lock import PriorityLock
from bstack.packed.matrix import check_index

__all__ = ["install"]

# Maximum differences of a logit, as fractions of their standard deviation: of a recorded step from the same one launch by launch,
# and of that from one with transformers' own cache, whose sums in 16 bits have another order.
TOLERANCE, OF_16_BITS = 0.02, 0.3


def install(model: Any, lock: PriorityLock) -> str | None:
    """Give a model on a GPU steps that are recorded; return why it has none, None when it has them.

    All blocks of the base model must be in memory, since results are compared with those of the model's own code.
    """
    if cache_argument(model) not in inspect.signature(model.forward).parameters:
        return "it has another kind of cache"
    if not model._supports_default_dynamic_cache() or model.config.is_encoder_decoder:
        return "it has another kind of cache"
    step = _RecordedStep(model, lock)
    try:
        agrees = step.agrees()
    except Exception as error:  # any: what is asked for may be something else in a structure that nobody foresaw
        if of_the_machine(error):
            raise
        return f"{type(model).__name__} is built in another way than most"
    if step.failure is not None:
        return f"its steps cannot be recorded ({step.failure})"
    if agrees is None:
        return "its steps differ in more than values"
    if not agrees:
        warnings.warn(
            f"Recorded steps do not give {type(model).__name__}'s results, so they are launched kernel by kernel, which is "
            "slower. Please report the architecture.",
            SlowerWarning,
            stacklevel=3,
        )
        return "recorded, it gives other results"
    model.forward = step.forward
    return None


class _RecordedStep:
    """A model's `forward` whose steps are recorded, one shape of them at a time."""

    def __init__(self, model: Any, lock: PriorityLock):
        self._model, self._lock = model, lock
        self._own = model.forward
        self._signature, self._argument = inspect.signature(self._own), cache_argument(model)
        self._words = model.get_input_embeddings().weight.shape[0]
        self._stepping = threading.Lock()
        #: Why steps cannot be recorded.
        self.failure: str | None = None
        self._graph: Any = None
        self._key: Any = None
        self._cache: Callable[[], Any] = lambda: None
        self._inputs: dict[Any, torch.Tensor] = {}
        self._output: Any = None
        self.forward = forward_by_names(model, self._forward)

    def _forward(self, given: dict[str, Any]) -> Any:
        cache = given.get(self._argument)
        if self.failure is None:
            fix(cache)
        if not self._is_step(cache, given) or not self._stepping.acquire(blocking=False):
            return self._own(**given)  # while another thread steps, too
        try:
            return self._step(cache, given)
        finally:
            self._stepping.release()

    def _step(self, cache: Any, given: dict[str, Any]) -> Any:
        tensors, rest = _apart({name: value for name, value in given.items() if name != self._argument})
        key = self._key_of(cache, tensors, rest)
        full = any(layer.used == layer.keys.shape[-2] for layer in cache.layers)
        if key != self._key or self._cache() is not cache or full:
            self._graph = self._key = None
            # Once without a recording, so that libraries have what they need.
            if self._output is None:
                output, waits = run_and_look_for_waits(lambda: self._own(**given), self._model.device)
                if waits:  # a recording would fail, after which not all versions of torch are as before
                    self.failure = warn_not_recorded("their code waits for the GPU", self._model.device)
                    return output
            else:
                output = self._own(**given)
            if isinstance(output, dict) and all(
                value is cache or isinstance(value, torch.Tensor) for value in output.values()
            ):
                self._key, self._cache = self._key_of(cache, tensors, rest), weakref.ref(cache)
            return output
        check_index(given["input_ids"], self._words)
        if self._graph is None:
            self._record(cache, tensors, rest)
            if self._graph is None:
                return self._own(**given)
        else:
            for name, value in tensors.items():
                self._inputs[name].copy_(value)
            for layer in cache.layers:
                layer.used += 1
        with self._lock.acquire():
            self._graph.replay()
            if self._model.device.type == "cuda":
                torch.cuda.current_stream(self._model.device).synchronize()
        found = {name: value.clone() for name, value in self._output.items() if isinstance(value, torch.Tensor)}
        return type(self._output)(**found, **{self._argument: cache})

    def _is_step(self, cache: Any, given: dict[str, Any]) -> bool:
        """Return whether a call reads one token of each text and depends on nothing but values of tensors."""
        ids, masks = given.get("input_ids"), given.get("attention_mask")
        masks = list(masks.values()) if isinstance(masks, dict) else [masks]
        layers = getattr(cache, "layers", ())
        return (
            self.failure is None
            and ids is not None
            and ids.shape[1] == 1
            and given.get("use_cache") is not False
            and given.get("return_dict") is not False
            and not torch.is_grad_enabled()
            and all(isinstance(mask, torch.Tensor) and mask.dim() == 4 for mask in masks)
            # Without them the model counts the positions in Python.
            and (
                "position_ids" not in self._signature.parameters or isinstance(given.get("position_ids"), torch.Tensor)
            )
            and bool(layers)
            and all(type(layer) is FixedLayer and layer.used for layer in layers)
        )

    def _key_of(self, cache: Any, tensors: dict[Any, torch.Tensor], rest: dict[Any, Any]) -> Any:
        """Return what two calls have to share for the second to be a replay of the first."""
        shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        places = [layer.addresses for layer in cache.layers]
        return shapes, rest, places, torch.is_inference_mode_enabled()

    def _record(self, cache: Any, tensors: dict[Any, torch.Tensor], rest: dict[Any, Any]) -> None:
        """Record a step; `failure` says why it cannot be."""
        self._inputs = {name: value.clone() for name, value in tensors.items()}
        given = {**_together({**self._inputs, **rest}), self._argument: cache}
        used = [layer.used for layer in cache.layers]
        try:
            self._graph, self._output = record(lambda: self._own(**given), self._model.device, warm=False)
        except RuntimeError as error:
            for layer, count in zip(cache.layers, used, strict=True):
                layer.used = count
            self.failure = warn_not_recorded(one_line(error), self._model.device)
        # The cache may go before the recording does.
        if self._output is not None:
            self._output = type(self._output)(**{n: v for n, v in self._output.items() if v is not cache})

    def agrees(self) -> bool | None:
        """Return whether some tokens give the logits of the model's own code; None if none of them came from a recording."""
        from transformers import GenerationConfig

        device = self._model.device
        ids = (torch.arange(8, device=device) * 7919 % self._model.config.get_text_config().vocab_size)[None]

        def forced(read: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(scores).index_fill_(1, ids[0, read.shape[1] : read.shape[1] + 1], 1.0)

        def logits() -> torch.Tensor:
            options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
            settings = GenerationConfig(max_new_tokens=5, **options)
            with torch.no_grad(), decoding(self._model, settings):
                given = {"attention_mask": torch.ones_like(ids[:, :3]), "generation_config": settings}
                return torch.stack(self._model.generate(ids[:, :3], logits_processor=[forced], **given).logits)

        restore = plain_outputs(self._model)
        try:
            expected = logits()
            self._model.forward = self.forward
            with self._stepping:  # as another thread would, so that nothing is recorded
                launched = logits()
            found = logits()
        finally:
            restore()
            vars(self._model).pop("forward", None)
        if self._graph is None:
            return None
        most = TOLERANCE if self._model.dtype.itemsize > 2 else OF_16_BITS
        pairs = (found, launched, TOLERANCE), (launched, expected, most)
        return all(bool((one - other).abs().max() <= part * expected.std()) for one, other, part in pairs)


def _apart(given: dict[str, Any]) -> tuple[dict[Any, torch.Tensor], dict[Any, Any]]:
    """Return the tensors among arguments, and in dictionaries among them, by name and key; and all else."""
    flat: dict[Any, Any] = {}
    for name, value in given.items():
        flat |= {(name, key): one for key, one in value.items()} if isinstance(value, dict) else {(name,): value}
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _together(flat: dict[Any, Any]) -> dict[str, Any]:
    """Return what `_apart` took apart."""
    given: dict[str, Any] = {}
    for (name, *key), value in flat.items():
        if key:
            given.setdefault(name, {})[key[0]] = value
        else:
            given[name] = value
    return given
