"""The fast path of decoding: one token of one sequence runs through all layers in one call of the C kernels.

A model is taken for one of the Llama family by its structure, and then by its results: some tokens must give the logits
that its own code gives. Everything else (prompts, batches, other models, other types) runs the model's own code.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from bstack.kernels.decoder import MAX_PARTS, Decoder, Layer, Sizes
from bstack.kernels.native import library
from bstack.models.kv_cache import GrowingLayer, growing_cache, let_grow
from bstack.packed.lock import Gate
from bstack.packed.matrix import Blocks
from bstack.packed.weight import PackedWeight

__all__ = ["install"]

# By class, too: others have the same modules and another arithmetic, which may show only after thousands of tokens.
_CLASSES = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}
# Tables of positions that do not depend on how long the text is.
_ROTARY = {"default", "linear", "llama3", "yarn"}
# What the kernels were told of, beside weights and children: attributes of modules that a program may set.
_SETTINGS = ("scaling", "variance_epsilon", "eps")
# Largest difference of a logit from the model's own, as a share of their standard deviation: products round their
# inputs in another order, and that is all.
TOLERANCE = 0.02
POSITIONS = 256


def install(model: Any, gate: Gate) -> bool:
    """Give a model the fast path where it has its structure; return whether it has it now.

    All blocks of the smallest model must be in memory: the results are compared with those of the model's own code.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With packed weights.
    gate : Gate
        Of its blocks.

    Warns
    -----
    RuntimeWarning
        The structure is that of the Llama family, but the results are not those of the model's code.
    """
    if library() is None or model.device.type != "cpu":
        return False
    try:
        decoder = _decoder(model)
    except (AttributeError, KeyError, ValueError):
        return False  # another structure
    fast = _Fast(model, decoder, gate)
    agrees = fast.agrees()
    if agrees is None:
        return False
    if not agrees:
        warnings.warn(
            f"The fast path of decoding does not give {type(model).__name__}'s results, so its own code is used, which is "
            "slower. Please report the architecture.",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    model.forward = fast.forward
    return True


class _Fast:
    def __init__(self, model: Any, decoder: Decoder, gate: Gate):
        self._model, self._decoder, self._gate = model, decoder, gate
        self._slow = model.forward
        self._rotary = model.model.rotary_emb
        self._cosine = self._sine = np.empty((0, 0), np.float32)
        self._turn = threading.Lock()  # one step at a time: the decoder holds the addresses of one cache
        self._cache: weakref.ref[Any] | None = None
        self._addresses: list[int] = []
        self._capacity = 0
        self._loaded = _Loaded(model)
        self._signature = inspect.signature(self._slow)

        @functools.wraps(self._slow)  # `generate` reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        self.forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        cache = given.get("past_key_values")
        if cache is None and given.get("use_cache", self._model.config.use_cache) and given.get("labels") is None:
            cache = given["past_key_values"] = growing_cache(self._model)
        elif cache is not None:
            let_grow(cache)
        if not self._applies(**given):
            return self._slow(**given)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        logits = self._step(given["input_ids"], cache)
        if logits is None:
            return self._slow(**given)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits)[None, None], past_key_values=cache)

    def agrees(self) -> bool | None:
        """Whether a few tokens give the logits of the model's own code; None where it would not be used for them."""
        if not self._as_loaded():
            return None
        vocabulary = self._decoder.vocabulary
        ids = (torch.arange(6) * 7919 % vocabulary)[None]
        cache = growing_cache(self._model)
        with torch.no_grad():
            expected = self._slow(ids, return_dict=True).logits[0, 3:]
            self._slow(ids[:, :3], past_key_values=cache, use_cache=True, return_dict=True)
            if not self._applies(ids[:, 3:4], past_key_values=cache):
                return None
            found = torch.stack([torch.from_numpy(self._step(ids[:, at : at + 1], cache)) for at in (3, 4, 5)])
        return bool((found - expected).abs().max() <= TOLERANCE * expected.std())

    def _applies(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        logits_to_keep: Any = 0,
        cache_position: Any = None,
        return_dict: Any = None,
        **rest: Any,
    ) -> bool:
        """Whether a call is one more token of one sequence, asks for logits alone, and of the model as it was loaded."""
        if input_ids is None or input_ids.shape != (1, 1) or use_cache is False or return_dict is False:
            return False
        if any(value is not None and value is not False for value in rest.values()) or not self._as_loaded():
            return False
        layers = getattr(past_key_values, "layers", None)
        if not layers or any(type(layer) is not GrowingLayer for layer in layers):
            return False
        first, last = layers[0], layers[-1]
        used = first.get_seq_length()
        if not used or used != last.get_seq_length() or first.keys.dtype != torch.float32 or first.keys.shape[0] != 1:
            return False
        if attention_mask is not None and not (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.shape == (1, used + 1)
            and bool(attention_mask.all())
        ):
            return False
        return position_ids is None or int(position_ids) == used

    def _as_loaded(self) -> bool:
        """Whether the model is what it was, and nothing but logits is asked for by the configuration."""
        config = self._model.config
        return (
            not (config.output_hidden_states or config.output_attentions)
            and config.return_dict
            and self._loaded.holds()
            and self._model.dtype == torch.float32
        )

    def _step(self, input_ids: torch.Tensor, cache: Any) -> np.ndarray | None:
        """One token through the kernels; None, and nothing done, where the layers of the cache are not of one length."""
        with self._turn:
            position = cache.layers[0].get_seq_length()
            buffers = [layer.reserve(1) for layer in cache.layers]
            addresses = [buffer.data_ptr() for pair in buffers for buffer in pair]
            # The addresses do not tell: where a buffer was freed, another of a new length may begin.
            capacity = buffers[0][0].shape[-2]
            if any(buffer.shape[-2] != capacity for pair in buffers for buffer in pair):
                return None
            known = self._cache is not None and self._cache() is cache
            if not known or addresses != self._addresses or capacity != self._capacity:
                self._decoder.use_cache(addresses[0::2], addresses[1::2], capacity)
                self._cache, self._addresses, self._capacity = weakref.ref(cache), addresses, capacity
            self._place(position)
            x = self._model.get_input_embeddings()(input_ids)[0, 0].float().contiguous().numpy()
            with self._gate.step_back():
                logits = self._decoder.step(x, self._cosine[position], self._sine[position], position)
            for layer in cache.layers:
                layer.advance(1)
            return logits

    def _place(self, position: int) -> None:
        """Have the rotary tables reach a position."""
        if position < len(self._cosine):
            return
        positions = torch.arange(position + POSITIONS)[None]
        cosine, sine = self._rotary(torch.zeros(1), positions)
        self._cosine, self._sine = (np.ascontiguousarray(t[0].float().numpy()) for t in (cosine, sine))


class _Loaded:
    """A model's modules as they are now: what was not hooked, replaced or set since.

    It is asked for every token, so what it compares is in lists that need no step of Python for each module.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks += [
            torch.nn.modules.module._global_forward_hooks,
            torch.nn.modules.module._global_forward_pre_hooks,
        ]
        # A forward of a module's own, in the place of its class's; the model has one, which asks here.
        self._own = [vars(module) for module in modules if module is not model]
        self._modules, self._kinds = modules, [type(module) for module in modules]
        classes = {type(module) for module in modules if module is not model}
        self._classes, self._forwards = list(classes), [kind.forward for kind in classes]
        # A parameter may be the same and its values others, in other memory: torch itself moves them so. The kernels have the
        # addresses of those that are not packed.
        self._plain = [parameter for parameter in model.parameters() if not isinstance(parameter, PackedWeight)]
        self._places = [parameter.data_ptr() for parameter in self._plain]
        parts = [
            (owner, name, part)
            for module in modules
            for owner in (module._modules, module._parameters)
            for name, part in owner.items()
        ]
        self._owners, self._names, self._parts = zip(*parts, strict=True)
        settings = [
            (vars(module), name, vars(module)[name]) for module in modules for name in _SETTINGS if name in vars(module)
        ]
        # Training changes what attention does, and nothing else in these models.
        settings += [
            (vars(module), "training", module.training) for module in modules if hasattr(module, "attention_dropout")
        ]
        self._holders, self._settings, self._values = zip(*settings, strict=True)

    def holds(self) -> bool:
        """Whether the modules are what they were."""
        return (
            not any(self._hooks)
            and not any(map(operator.contains, self._own, itertools.repeat("forward")))
            and all(map(operator.is_, map(type, self._modules), self._kinds))
            and all(map(operator.is_, map(operator.attrgetter("forward"), self._classes), self._forwards))
            and all(map(operator.eq, map(torch.Tensor.data_ptr, self._plain), self._places))
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._parts))
            and all(map(operator.eq, map(dict.get, self._holders, self._settings), self._values))
        )


def _decoder(model: Any) -> Decoder:
    """The model as the kernels see it; raises AttributeError, KeyError or ValueError for another structure."""
    config = model.config
    base, layers = model.model, list(model.model.layers)
    attention = layers[0].self_attn
    rotary = getattr(base.rotary_emb, "rope_type", None)
    cache = growing_cache(model)
    if (
        config.hidden_act != "silu"
        or model.dtype != torch.float32
        or rotary not in _ROTARY
        or cache is None
        or any(type(layer) is not GrowingLayer for layer in cache.layers)
    ):
        raise ValueError("another structure")
    for layer in layers:
        kind = type(layer.self_attn)
        if kind.__name__ not in _CLASSES or not kind.__module__.startswith("transformers.models."):
            raise ValueError("another attention")
        _needs(layer, _LAYER)
        _needs(layer.self_attn, _ATTENTION, _NORMS)
        _needs(layer.mlp, _FEED_FORWARD, {"act_fn"})
    head = model.get_output_embeddings()
    if head.bias is not None or not isinstance(head.weight, PackedWeight) or not isinstance(head.weight.packed, Blocks):
        raise ValueError("another head")
    head_width = attention.head_dim
    heads, key_heads = (module.weight.packed.rows // head_width for module in (attention.q_proj, attention.k_proj))
    sizes = Sizes(
        config.hidden_size,
        layers[0].mlp.gate_proj.weight.packed.rows,
        heads,
        key_heads,
        head_width,
        _epsilon(layers[0].input_layernorm),
        float(attention.scaling),
    )
    parts = head.weight.packed.parts
    if len(parts) > MAX_PARTS:
        raise ValueError("too many parts")
    return Decoder(library(), sizes, [_layer(layer) for layer in layers], _array(base.norm.weight), parts)


def _needs(module: nn.Module, names: set[str], allowed: set[str] = frozenset()) -> None:
    present = {name for name, _ in module.named_children()}
    if not names <= present or present - names - allowed:
        raise ValueError("another structure")


def _layer(layer: nn.Module) -> Layer:
    attention, feed_forward = layer.self_attn, layer.mlp
    modules = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "out": attention.o_proj,
        "gate": feed_forward.gate_proj,
        "up": feed_forward.up_proj,
        "down": feed_forward.down_proj,
    }
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        **{name: _matrix(module) for name, module in modules.items()},
        **{f"{name}_bias": _array(module.bias) for name, module in modules.items()},
        input_norm=_array(layer.input_layernorm.weight),
        post_norm=_array(layer.post_attention_layernorm.weight),
        query_norm=None if query_norm is None else _array(query_norm.weight),
        key_norm=None if key_norm is None else _array(key_norm.weight),
    )


def _matrix(module: nn.Module) -> Any:
    packed = module.weight.packed
    if module.weight.transposed or not isinstance(packed, Blocks) or len(packed.parts) != 1:
        raise ValueError("another kind of weight")
    return packed.parts[0]


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else np.ascontiguousarray(tensor.detach().float().numpy())


def _epsilon(norm: nn.Module) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
