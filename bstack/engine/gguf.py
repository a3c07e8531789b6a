"""Write a container as a GGUF file with dense or quantised weights, for llama.cpp and the programs that build on it."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bstk
from bstack.engine.container import build_model, dense_weights, embedded_files
from bstack.engine.native.architecture import EMBEDDING, HEAD, Architecture, NotNativeError, read_json
from bstack.engine.native.families import describe
from bstack.engine.native.generate import TextTokenizer
from bstack.errors import ModelWarning, UnsupportedModelError, lacks
from bstk.atomic import replacing
from bstk.errors import BstkError, UsageError

__all__ = ["TYPES", "ExportedGGUF", "export_gguf"]

# Name on the command line -> names of the tensors' type, and of the file's, in gguf: those that it can write.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q5_1": ("Q5_1", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
HALF_MAX = 65504
# Model types of transformers -> architectures of llama.cpp.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# How llama.cpp names the ways in which a byte-level tokenizer splits a text, by what tokenizer.json says: the pattern of the
# split (None: the one of GPT-2), whether digits stand alone, whether whole words are taken before merges.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    (None, False, False): "gpt-2",
    (None, True, False): "smollm",
    (_WORDS % "", False, False): "qwen2",
    (_WORDS % "{1,3}", False, True): "llama-bpe",
    (_WORDS % "{1,3}", False, False): "smaug-bpe",
}
_ADVICE = "Export it with safetensors, and convert that folder with llama.cpp's own converter."


@dataclass(frozen=True)
class ExportedGGUF:
    """What `export_gguf` wrote: numbers of weights, bytes of the file, and the cut that was used."""

    parameters: int
    file_bytes: int
    cut: bstk.Cut


def export_gguf(
    file: bstk.Reader,
    path: str | os.PathLike[str],
    *,
    kind: str = "q8_0",
    budget: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> ExportedGGUF:
    """Write a container's model as a GGUF file, of the families whose computation and names llama.cpp shares.

    Parameters
    ----------
    file : bstk.Reader
    path : path
        Must not exist. It appears whole or not at all.
    kind : str
        One of `TYPES`: the type of matrices. Embedding and head have 8 bits at least; norms and biases are float32.
    budget : int, optional
        Use the blocks of the largest cut of at most so many bytes; by default all.
    progress : callable
        Receives the stored bytes of each parameter.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        llama.cpp does not compute what this model's configuration asks for, its tokenizer has no name there, or it has none.
    bstk.UsageError
        A weight is too large for `kind`.
    bstk.BudgetError
        The base model is larger than `budget`.
    bstk.BstkError
        The package gguf is missing; the file is damaged, or cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise BstkError("Writing a GGUF file needs the package gguf: pip install 'bstack[gguf]'") from None

    shown = file.source.name
    cut = file.fit(budget=budget)
    chunks = file.chunks[: cut.chunks]
    config = dict(read_json(file, "config.json"))
    try:
        model = _check(config, describe(config))
        tokenizer = TextTokenizer.read(file)
    except NotNativeError as error:
        raise UnsupportedModelError(f"{shown}: no GGUF file is made of it: {error.reason}.", hint=_ADVICE) from None
    if tokenizer is None:
        raise UnsupportedModelError(
            f"{shown} has no tokenizer, without which llama.cpp reads no file.",
            hint="Compress the model with its tokenizer.",
        )
    family = FAMILIES[config["model_type"]]
    stored: dict[str, int] = {}
    for chunk in chunks:
        if chunk.is_weight:
            name = chunk.name.partition("[")[0]
            stored[name] = stored.get(name, 0) + chunk.stored_length
    parameters = 0
    with (
        replacing(path, overwrite=False) as (_, temporary),
        embedded_files(file) as inside,
        tempfile.TemporaryFile(dir=Path(temporary).parent) as waiting,
    ):
        skeleton = build_model(file, inside, False, torch.device("meta"))
        # Tensors wait in a file until the header, which names all of them, is written; on the disk of the output, because the
        # system's folder for such files is often in memory.
        writer: Any = gguf.GGUFWriter(temporary, family, use_temp_file=True)
        try:
            writer.temp_file = waiting
            _add_configuration(writer, model, kind, str((file.metadata.get("model") or {}).get("name") or "model"))
            _add_tokenizer(writer, file, tokenizer, config, model.vocabulary)
            _add_rotary(writer, config, model, family, shown)
            names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), model.layers)
            missing = set(model.shapes())
            for name, tensor in dense_weights(file, chunks, skeleton, torch.float32):
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None or name not in missing:
                    raise UnsupportedModelError(f"{shown}: {name} has no name in a GGUF file.", hint=_ADVICE)
                missing.remove(name)
                parameters += tensor.numel()
                values = _llama_order(name, tensor.numpy(), model) if family == "llama" else tensor.numpy()
                data, form = _encoded(name, values, kind, shown)
                writer.add_tensor(target, data, raw_dtype=form)
                progress(stored.get(name, 0))
            if missing:
                raise lacks(shown, missing)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        size = os.stat(temporary).st_size
    return ExportedGGUF(parameters, size, cut)


def _check(config: dict[str, Any], model: Architecture) -> Architecture:
    """Refuse what llama.cpp computes in another way; NotNativeError says what."""
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise NotNativeError(f"its architecture is {config['model_type']!r}; bstack writes {', '.join(FAMILIES)}")
    allowed = {"llama": set(model.names), "qwen2": {"query", "key", "value"}, "qwen3": set()}[family]
    if extra := sorted(model.biases - allowed):
        raise NotNativeError(f"it has a bias ({extra[0]}), which {family} has not in llama.cpp")
    if any(0 < window < model.context for window in model.windows):
        raise NotNativeError("its attention sees a window, which llama.cpp does not compute for it")
    if model.activation != "silu":
        raise NotNativeError("its activation is another than llama.cpp's")
    return model


def _add_configuration(writer: Any, model: Architecture, kind: str, name: str) -> None:
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocabulary)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.key_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_rope_dimension_count(model.head_width)
    writer.add_layer_norm_rms_eps(model.epsilon)


def _add_rotary(writer: Any, config: dict[str, Any], model: Architecture, family: str, shown: str) -> None:
    """Write the scaling of rotary positions; beyond the usual and the linear one, by what frequencies are divided."""
    import gguf

    parameters = config["rope_parameters"]
    kind, base = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    writer.add_rope_freq_base(base)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    elif kind == "llama3" and family == "llama":
        (rope,) = model.rotary
        usual = 1 / base ** (np.arange(0, model.head_width, 2) / model.head_width)
        # Rounded, because frequencies that stay as they are must be divided by 1.
        writer.add_tensor("rope_freqs.weight", np.round(usual / rope.frequencies, 5).astype(np.float32))
    elif kind not in ("default", "dynamic"):  # of the latter only texts beyond the context differ
        raise UnsupportedModelError(
            f"{shown}: no GGUF file is made of it: its rotary positions are of kind {kind!r}.", hint=_ADVICE
        )


def _add_tokenizer(
    writer: Any, file: bstk.Reader, tokenizer: TextTokenizer, config: dict[str, Any], vocabulary: int
) -> None:
    import gguf

    shown = file.source.name
    content = json.loads(file.file("tokenizer.json"))
    pre = _split_name(content)
    if pre is None:
        raise UnsupportedModelError(
            f"{shown}: no GGUF file is made of it: llama.cpp has no name that bstack knows for the way in which its tokenizer "
            "splits a text.",
            hint=_ADVICE,
        )
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    words = [(number, text, gguf.TokenType.NORMAL) for text, number in content["model"]["vocab"].items()]
    for token in content.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        words.append((token["id"], token["content"], kind))
    for number, text, kind in words:
        if 0 <= number < vocabulary:  # others the model cannot read
            tokens[number], types[number] = text, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {text: number for number, text in enumerate(tokens)}
    special = {name: ids[text] for name, text in tokenizer.special_tokens.items() if text in ids}
    ends, begin = (
        next(filter(None, (_ids(value, vocabulary) for value in found)), [])
        for found in (
            (
                read_json(file, "generation_config.json").get("eos_token_id"),
                config.get("eos_token_id"),
                special.get("eos_token"),
            ),
            (config.get("bos_token_id"), special.get("bos_token")),
        )
    )
    # The model's generation ends at each of them.
    adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(adds, ends, strict=False):
        add(end)
    if more := ends[len(adds) :]:
        warnings.warn(
            f"{shown}: a text of it ends at {len(ends)} tokens, but a GGUF file names {len(adds)}; left out: "
            f"{', '.join(repr(tokens[number]) for number in more)}.",
            ModelWarning,
            stacklevel=3,
        )
    for add, numbers in (
        (writer.add_bos_token_id, begin),
        (writer.add_unk_token_id, _ids(special.get("unk_token"), vocabulary)),
        (writer.add_pad_token_id, _ids(special.get("pad_token"), vocabulary)),
    ):
        if numbers:
            add(numbers[0])
    plain, around = tokenizer.encode("a", special=False), tokenizer.encode("a", special=True)
    start = around.index(plain[0]) if plain and plain[0] in around else 0
    writer.add_add_bos_token(start > 0)
    writer.add_add_eos_token(len(around) > start + len(plain))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _ids(value: object, vocabulary: int) -> list[int]:
    """Return the tokens of a setting that is one, a list of them, or none; without those that the model never writes, such as -1."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int and 0 <= number < vocabulary]


def _split_name(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the way in which a tokenizer.json splits a text; None for one that is not known."""
    model, pre = content["model"], content.get("pre_tokenizer") or {}
    normalizer = content.get("normalizer")
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if (
        not steps
        or model.get("type") != "BPE"
        or model.get("byte_fallback")
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or (normalizer is not None and normalizer.get("type") != "NFC")  # which llama.cpp leaves out
        or steps[-1].get("type") != "ByteLevel"
        or steps[-1].get("add_prefix_space")
    ):
        return None
    split, digits = None, False
    for step in steps[:-1]:
        if split is None and step.get("type") == "Digits" and step.get("individual_digits"):
            digits = True
        elif (
            split is None
            and step.get("type") == "Split"
            and step.get("behavior") == "Isolated"
            and not step.get("invert")
        ):
            split = (step.get("pattern") or {}).get("Regex", "")
        else:
            return None
    if (split is None) != bool(steps[-1].get("use_regex", True)):
        return None
    return SPLITS.get((split, digits, bool(model.get("ignore_merges"))))


def _llama_order(name: str, values: np.ndarray, model: Architecture) -> np.ndarray:
    """Order the rows of queries and keys as llama.cpp rotates them: pairs side by side, not in the halves of a head."""
    for part, heads in (("q_proj", model.heads), ("k_proj", model.key_heads)):
        if f".{part}." in name:
            split = values.reshape(heads, 2, model.head_width // 2, *values.shape[1:])
            return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
    return values


def _encoded(name: str, values: np.ndarray, kind: str, shown: str) -> tuple[np.ndarray, Any]:
    """Return the bytes of a tensor and their type in gguf: float32 for vectors, half precision where rows do not divide into blocks.

    UsageError for weights that half precision does not hold, in which all types but float32 and bfloat16 keep numbers.
    """
    import gguf

    form = gguf.GGMLQuantizationType[TYPES[kind][0]]
    if values.ndim == 1:
        form = gguf.GGMLQuantizationType.F32
    elif kind.startswith(("q4", "q5")) and name in (EMBEDDING, HEAD):
        form = gguf.GGMLQuantizationType.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[form]
    if values.shape[-1] % block:
        form = gguf.GGMLQuantizationType.F16
    if form.name not in ("F32", "BF16") and max(values.max(), -values.min()) > HALF_MAX:
        raise UsageError(
            f"{shown}: {name} has weights beyond {HALF_MAX}, which {form.name} cannot hold.", option="kind"
        )
    return gguf.quants.quantize(np.ascontiguousarray(values), form), form
