"""The fused step of decoding: one token of one sequence runs through all layers in one call of the C kernels.

Models of the Llama family are recognized once, at `install`: by their classes and structure, and then by their results, since
some tokens must give the logits of the model's own code. Modules that are changed or hooked later are not noticed;
``bstack.load(..., fused=False)`` leaves the fused step out. Everything else (prompts, batches, other models, other types) runs
the model's own code.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from bstack.errors import SlowerWarning
from bstack.kernels.decoder import MAX_PARTS, Decoder, Layer, Sizes
from bstack.kernels.native import library
from bstack.models.kv_cache import GrowingLayer, cache_argument, forward_by_names, growing_cache, let_grow
from bstack.packed.lock import PriorityLock
from bstack.packed.matrix import Blocks
from bstack.packed.weight import PackedWeight

__all__ = ["install"]

# Other classes with the same modules may compute something else, which may show only after thousands of tokens.
_CLASSES = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
# Modules that each part of a layer must have, and those that it may have.
_MODULES = {
    "": ({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}, set()),
    "self_attn": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}),
    "mlp": ({"gate_proj", "up_proj", "down_proj"}, {"act_fn"}),
}
# Names of the products in the kernels.
_PRODUCTS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Rotary embeddings that do not depend on the length of the text.
_ROTARY = {"default", "linear", "llama3", "yarn"}
# Maximum difference of a logit from that of the model's own code, as a fraction of their standard deviation: products round
# their inputs in another order.
TOLERANCE = 0.02
# Positions by which the rotary tables grow.
POSITIONS = 256
# Arguments that `generate` hands on to `forward`, where nothing reads them.
_UNREAD = {"tokenizer", "assistant_tokenizer"}


def install(model: Any, lock: PriorityLock) -> str | None:
    """Give a model of the Llama family the fused step; return why it has none, None when it has it.

    All blocks of the base model must be in memory, since results are compared with those of the model's own code.
    """
    kernels = library()
    if kernels is None:
        return "the C kernels are not built"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if not getattr(model.config, "is_causal", True):
        return "its attention looks forward, too"
    if _is_patched(model):
        return "its modules have hooks or replaced methods"
    try:
        step = _FusedStep(model, _decoder(model, kernels), lock)
        agrees = step.agrees()
    except Exception:  # any: what is looked at may be something else in a structure that nobody foresaw
        return f"{type(model).__name__} is built in another way than the Llama family"
    if agrees is None:
        return "it has another type than float32, or its configuration asks for more than logits"
    if not agrees:
        warnings.warn(
            f"The fused step of decoding does not give {type(model).__name__}'s results, so the model's own code is used, "
            "which is slower. Please report the architecture.",
            SlowerWarning,
            stacklevel=3,
        )
        return "it gives other results"
    model.forward = step.forward
    return None


class _FusedStep:
    """A model's `forward` with the fused step for the calls that allow it."""

    def __init__(self, model: Any, decoder: Decoder, lock: PriorityLock):
        self._model, self._decoder, self._lock = model, decoder, lock
        self._own = model.forward
        self._rotary = model.model.rotary_emb
        self._cosine = self._sine = np.empty((0, 0), np.float32)
        self._stepping = threading.Lock()  # the decoder holds the addresses of one cache
        self._cache: weakref.ref[Any] | None = None
        self._addresses: list[int] = []
        self._capacity = 0
        self._argument = cache_argument(model)
        self._warned: set[str] = set()
        self.forward = forward_by_names(model, self._forward)

    def _forward(self, given: dict[str, Any]) -> Any:
        cache = given.get(self._argument)
        if cache is None and given.get("use_cache", self._model.config.use_cache) and given.get("labels") is None:
            cache = given[self._argument] = growing_cache(self._model)
        elif cache is not None:
            let_grow(cache)
        if not _is_one_token(given.get("input_ids"), cache):
            return self._own(**given)
        if hindrance := self._hindrance(
            cache, **{name: value for name, value in given.items() if name != self._argument}
        ):
            self._warn(hindrance)
            return self._own(**given)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        logits = self._step(given["input_ids"], cache)
        if logits is None:
            return self._own(**given)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits)[None, None], **{self._argument: cache})

    def agrees(self) -> bool | None:
        """Return whether some tokens give the logits of the model's own code; None if the step does not apply to them."""
        if not self._gives_logits():
            return None
        vocabulary = self._decoder.vocabulary
        ids = (torch.arange(6) * 7919 % vocabulary)[None]
        cache = growing_cache(self._model)
        with torch.no_grad():
            expected = self._own(ids, return_dict=True).logits[0, 3:]
            self._own(ids[:, :3], use_cache=True, return_dict=True, **{self._argument: cache})
            if self._hindrance(cache, ids[:, 3:4]):
                return None
            found = torch.stack([torch.from_numpy(self._step(ids[:, at : at + 1], cache)) for at in (3, 4, 5)])
        return bool((found - expected).abs().max() <= TOLERANCE * expected.std())

    def _hindrance(
        self,
        cache: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        logits_to_keep: Any = 0,
        cache_position: Any = None,
        return_dict: Any = None,
        **rest: Any,
    ) -> str | None:
        """Return what keeps a call for one more token from the fused step, None for nothing."""
        if use_cache is False or return_dict is False:
            return "use_cache or return_dict is False"
        asked = [key for key, value in rest.items() if value is not None and value is not False and key not in _UNREAD]
        if asked:
            return f"the call has {', '.join(sorted(asked))}"
        if not self._gives_logits():
            return "the configuration asks for more than logits, or the model is not in float32"
        layers = cache.layers
        if any(type(layer) is not GrowingLayer for layer in layers):
            return f"the cache of keys and values is a {type(cache).__name__} that does not grow in place"
        first, last = layers[0], layers[-1]
        used = first.get_seq_length()
        if used != last.get_seq_length() or first.keys.dtype != torch.float32 or first.keys.shape[0] != 1:
            return "the cache is in another type, or its layers differ"
        if attention_mask is not None and not (
            isinstance(attention_mask, torch.Tensor)
            and attention_mask.shape == (1, used + 1)
            and bool(attention_mask.all())
        ):
            return "the attention mask leaves out tokens"
        if position_ids is not None and position_ids.reshape(-1).tolist() != [used]:
            return "position_ids is not the length of the text"
        return None

    def _warn(self, hindrance: str) -> None:
        """Warn once that a token is decoded without the fused step."""
        if hindrance not in self._warned:
            self._warned.add(hindrance)
            warnings.warn(
                f"A token is decoded by {type(self._model).__name__}'s own code instead of the fused step, which is slower: "
                f"{hindrance}.",
                SlowerWarning,
                stacklevel=2,
            )

    def _gives_logits(self) -> bool:
        """Return whether the configuration asks for logits alone, in float32."""
        config = self._model.config
        return (
            not (config.output_hidden_states or config.output_attentions)
            and config.return_dict
            and self._model.dtype == torch.float32
        )

    def _step(self, input_ids: torch.Tensor, cache: Any) -> np.ndarray | None:
        """Run one token through the kernels; return None, and do nothing, if the layers of the cache differ in length."""
        with self._stepping:
            position = cache.layers[0].get_seq_length()
            buffers = [layer.reserve(1) for layer in cache.layers]
            addresses = [buffer.data_ptr() for pair in buffers for buffer in pair]
            # The addresses are not enough: a new buffer of another length may have the address of a freed one.
            capacity = buffers[0][0].shape[-2]
            if any(buffer.shape[-2] != capacity for pair in buffers for buffer in pair):
                return None
            known = self._cache is not None and self._cache() is cache
            if not known or addresses != self._addresses or capacity != self._capacity:
                self._decoder.use_cache(addresses[0::2], addresses[1::2], capacity)
                self._cache, self._addresses, self._capacity = weakref.ref(cache), addresses, capacity
            self._extend_rotary(position)
            x = self._model.get_input_embeddings()(input_ids)[0, 0].float().contiguous().numpy()
            with self._lock.acquire():
                logits = self._decoder.step(x, self._cosine[position], self._sine[position], position)
            for layer in cache.layers:
                layer.advance(1)
            return logits

    def _extend_rotary(self, position: int) -> None:
        """Compute the rotary tables up to a position."""
        if position < len(self._cosine):
            return
        positions = torch.arange(position + POSITIONS)[None]
        cosine, sine = self._rotary(torch.zeros(1), positions)
        self._cosine, self._sine = (np.ascontiguousarray(t[0].float().numpy()) for t in (cosine, sine))


def _is_one_token(input_ids: Any, cache: Any) -> bool:
    """Return whether a call is for one more token of one sequence."""
    return (
        input_ids is not None
        and input_ids.shape == (1, 1)
        and bool(getattr(cache, "layers", None))
        and bool(cache.get_seq_length())
    )


def _is_patched(model: nn.Module) -> bool:
    """Return whether hooks or replaced methods would change what the modules compute."""
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


def _decoder(model: Any, kernels: Any) -> Decoder:
    """Describe the model to the kernels; any exception for another structure."""
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
        for path, (needed, allowed) in _MODULES.items():
            present = {name for name, _ in layer.get_submodule(path).named_children()}
            if not needed <= present <= needed | allowed:
                raise ValueError("another structure")
    head = model.get_output_embeddings()
    if head.bias is not None or not isinstance(head.weight, PackedWeight) or not isinstance(head.weight.packed, Blocks):
        raise ValueError("another head")
    head_width = attention.head_dim
    heads, key_heads = (module.weight.packed.rows // head_width for module in (attention.q_proj, attention.k_proj))
    norm, inner = layers[0].input_layernorm, layers[0].mlp.gate_proj.weight.packed.rows
    epsilon = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
    sizes = Sizes(config.hidden_size, inner, heads, key_heads, head_width, epsilon, float(attention.scaling))
    parts = head.weight.packed.parts
    if len(parts) > MAX_PARTS:
        raise ValueError("too many parts")
    return Decoder(kernels, sizes, [_layer(layer) for layer in layers], _array(base.norm.weight), parts)


def _layer(layer: Any) -> Layer:
    attention = layer.self_attn
    modules: dict[str, Any] = {name: layer.get_submodule(path) for name, path in _PRODUCTS.items()}
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        **{name: _matrix(module) for name, module in modules.items()},
        **{f"{name}_bias": _array(module.bias) for name, module in modules.items()},
        input_norm=_array(layer.input_layernorm.weight),
        post_norm=_array(layer.post_attention_layernorm.weight),
        query_norm=_array(getattr(query_norm, "weight", None)),
        key_norm=_array(getattr(key_norm, "weight", None)),
    )


def _matrix(module: Any) -> Any:
    packed = module.weight.packed
    if module.weight.transposed or not isinstance(packed, Blocks) or len(packed.parts) != 1:
        raise ValueError("another kind of weight")
    return packed.parts[0]


def _array(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else np.ascontiguousarray(tensor.detach().float().numpy())
