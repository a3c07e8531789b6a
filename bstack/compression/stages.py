"""The stages of a compression in their order; each keeps its result in the work directory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bstk
from bstack.calibration.rehearsal import rehearse
from bstack.calibration.selftext import token_steps, write_windows
from bstack.calibration.sensitivity import BACKWARD_TOKENS, Sensitivity, output_sensitivity
from bstack.calibration.stream import batches_of
from bstack.calibration.texts import HELD_OUT, SELF, TextSource, open_text, token_windows
from bstack.codecs import make_codec
from bstack.compression.assemble import collect, gain_order, paper_order, to_entries
from bstack.compression.curve import SIZES, measure_curve, with_sizes
from bstack.compression.device import check_encoder, device_name
from bstack.compression.encode import Workers
from bstack.compression.exact import check_exact, make_exact
from bstack.compression.layers import (
    FILES_PART,
    OUTSIDE_PART,
    add_files,
    check_dense,
    compress_layers,
    compress_outside,
    embedding_part,
    embedding_statistics,
    embeddings,
    layer_part,
    layer_shapes,
    model_files,
)
from bstack.compression.plan import plan
from bstack.errors import UnsupportedModelError
from bstack.models.code import put_code
from bstack.models.files import put_files
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton, longest_text
from bstack.models.tokenizer import check_ids, tokenizer_files
from bstack.progress import Plan, Progress
from bstack.settings import Settings
from bstack.workdir import WorkDirectory

__all__ = ["Result", "run_stages"]

HELD_OUT_LENGTH = 512
# Tokens of the sensitivity run, which takes about three forward passes more for each: all of them by default, since those
# beyond it have no weight of their own in the hessians.
SENSITIVITY_TOKENS = 16384
WINDOWS = "windows"
# Among the tensors of the sensitivity run, whose other names are those of matrices.
EMBEDDING = "(embedding)"
TOKENS = "(tokens) "

# What the importance of a block above the base model means, by order.
IMPORTANCE = {
    "gain": "predicted fall of the divergence, nats per token and MB",
    "paper": "perplexity without this block and those above it",
}


class Result(NamedTuple):
    """What the container's writer needs, and the work directory to remove afterwards."""

    metadata: dict[str, Any]
    entries: list[bstk.Entry]
    base_count: int
    work: WorkDirectory


def run_stages(
    model: str,
    settings: Settings,
    work_path: Path,
    workers: Workers,
    progress: Progress,
    trust_remote_code: bool,
    on_plan: Callable[[Plan], None],
) -> Result:
    """Run or resume the stages; the parameters are those of `bstack.compress`."""
    codec = make_codec(settings)
    with progress("open", 1) as step:
        checkpoint = open_checkpoint(model, trust_remote_code)
        text = None if settings.calibration == SELF else open_text(settings.calibration)
        skeleton = Skeleton(checkpoint)
        check_encoder(codec, workers.device)
        check_dense(skeleton, settings.embeddings == "stack")
        codec.check_shapes(layer_shapes(skeleton))
        originals = checkpoint.originals(skeleton.model) if settings.exact else []
        if settings.exact:
            check_exact(codec, originals)
        files = model_files(checkpoint, settings.tokenizer)
        skeleton.move(workers.device)
        needs = plan(skeleton, settings, workers)
        rehearse(skeleton, writes_text=text is None)
        provenance = checkpoint.provenance()
        step()
    on_plan(needs)
    settings_record = {**settings.to_json(), **codec.settings(), "device": device_name(workers.device)}
    if text is not None:  # without its folder on the user's machine
        settings_record["calibration"] = text.name
        settings_record["calibration_sha256"] = hashlib.sha256(text.text.encode()).hexdigest()
    longest = longest_text(checkpoint.config)
    if longest is not None and settings.sequence_length > longest:
        raise bstk.BstkError(
            f"sequence_length is {settings.sequence_length}, but {checkpoint.name} reads at most {longest} tokens.",
            option="sequence_length",
        )
    code = {} if checkpoint.code is None else {"code": checkpoint.code.to_json()}
    source = {"format": provenance["format"], **{f["name"]: f["sha256"] for f in provenance["files"]}}
    work = WorkDirectory(work_path, {**settings_record, "model": {**source, **code}, "versions": _versions()})
    try:
        all_windows = _calibrate(skeleton, settings, text, files, work, progress)
        all_windows = all_windows.to(skeleton.device)
        windows, held_out = all_windows[: settings.samples], all_windows[settings.samples :, :HELD_OUT_LENGTH]
        batches = batches_of(windows)
        sensitivity = _sensitivity(skeleton, windows, settings.seed, work, progress)
        layers = [layer_part(i) for i in range(len(skeleton.layers))]
        with progress("layers", len(layers)) as step:
            if not all(map(work.has, layers)):  # the user deleted one that was damaged
                work.forget_tensors("head")
            head = work.tensors(
                "head", lambda: compress_layers(skeleton, batches, sensitivity, codec, work, workers, step)
            )
        embedding_codec = codec.for_embeddings() if settings.embeddings == "stack" else None
        statistics = partial(embedding_statistics, skeleton, head, sensitivity, windows.cpu())
        stacked = embeddings(skeleton) if embedding_codec else {}
        with progress("embeddings", sum(map(len, stacked.values()))) as step:
            compress_outside(skeleton, statistics, embedding_codec, work, workers, step)
        collected = collect(work, [FILES_PART, OUTSIDE_PART, *map(embedding_part, stacked), *layers])
        if settings.order == "paper":
            with progress("order", len(skeleton.layers) + 1) as step:
                order = paper_order(skeleton, windows, collected.stacks, ["embeddings", *layers], work, step)
        else:
            order = gain_order(collected.stacks)
        entries, base_count = to_entries(collected, order)
        with progress("curve", SIZES + 1) as step:
            curve = work.value("curve", lambda: measure_curve(skeleton, held_out, collected, entries, base_count, step))
        if settings.exact:
            skeleton.move(torch.device("cpu"))  # whose bits they are
            with progress("exact", len(skeleton.layers) + 2) as step:
                parts = make_exact(skeleton, originals, collected, work, step)
            entries += [record.entry for part in parts for record in work.records(part)]
    except BaseException as error:
        # A leftover would refuse what the user corrects: the settings, or a model in which a weight is infinite. Without
        # windows, and of such a model, nothing is worth resuming.
        of_model = isinstance(error, UnsupportedModelError)
        if of_model or (isinstance(error, Exception) and not work.has_tensors(WINDOWS)):
            work.remove()
        work.release()
        raise
    metadata = {
        "quality_text": f"{len(held_out)} held-out windows of {held_out.shape[1]} tokens of the calibration text",
        "model": {
            "name": checkpoint.name,
            "architecture": type(skeleton.model).__name__,
            "parameters": sum(p.numel() for p in skeleton.model.parameters()),
            **_original_sizes(skeleton, provenance["format"]),
            "source": provenance,
            **code,
        },
        "settings": {name: value for name, value in settings_record.items() if value is not None},
        "importance": IMPORTANCE[settings.order],
        "versions": _versions(),
    }
    return Result(with_sizes(curve, metadata, entries, base_count), entries, base_count, work)


def _original_sizes(skeleton: Skeleton, format: str) -> dict[str, Any]:
    """Return what the original takes as it is stored and in the precision of its weights, which is 16 bits if quantised."""
    checkpoint = skeleton.checkpoint
    sizes: dict[str, Any] = {"original_bytes": checkpoint.size_bytes}
    if checkpoint.quantisation is not None:
        count = sum(p.numel() for p in skeleton.model.parameters())
        sizes |= {"original_dtype": "bfloat16", "original_dtype_bytes": 2 * count}
        return {**sizes, "source_quantisation": f"{format.upper()} {checkpoint.quantisation}"}
    by_dtype: Counter[torch.dtype] = Counter()
    for name in [
        *skeleton.outside_names,
        *(n for i in range(len(skeleton.layers)) for n in skeleton.own_layer_names(i)),
    ]:
        if isinstance(parameter := skeleton.parameter(name), torch.nn.Parameter):
            dtype = checkpoint.stored_dtype(name)
            by_dtype[dtype] += parameter.numel() * dtype.itemsize
    dtype = max(by_dtype, key=lambda key: by_dtype[key])
    return {**sizes, "original_dtype": str(dtype).removeprefix("torch."), "original_dtype_bytes": by_dtype.total()}


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("bstack", "torch", "transformers")}


def _calibrate(
    skeleton: Skeleton,
    settings: Settings,
    text: TextSource | None,
    files: Mapping[str, bytes],
    work: WorkDirectory,
    progress: Progress,
) -> torch.Tensor:
    """Return the token windows; keep the files of configuration and tokenizer first."""
    add_files(files, work)  # in a resumed run, too: they may have been mended
    count = settings.samples + HELD_OUT

    def compute() -> dict[str, torch.Tensor]:
        if text is not None:
            tokenizer = _tokenizer(skeleton, files, work)
            windows = token_windows(text, tokenizer, settings.samples, settings.sequence_length, HELD_OUT)
            check_ids(windows, skeleton.parameter(skeleton.input_name).shape[0], tokenizer, text.name)
            return {"windows": windows}
        with progress("calibration text", token_steps(count, settings.sequence_length)) as step:
            windows = write_windows(skeleton, count, settings.sequence_length, seed=settings.seed, progress=step)
        return {"windows": windows}

    return work.tensors(WINDOWS, compute)["windows"]


def _tokenizer(skeleton: Skeleton, files: Mapping[str, bytes], work: WorkDirectory) -> Any:
    from transformers import AutoTokenizer

    code = skeleton.checkpoint.code
    if not tokenizer_files(files):
        raise bstk.BstkError(
            "The model has no tokenizer, so a calibration text cannot be read.",
            hint="Set calibration to self, or put the tokenizer's files beside the weights.",
        )
    folder = work.scratch()
    put_files(((name, [data]) for name, data in files.items()), folder, skeleton.checkpoint.name)
    if code is not None:
        put_code(code, folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=code is not None)


def _sensitivity(
    skeleton: Skeleton, windows: torch.Tensor, seed: int, work: WorkDirectory, progress: Progress
) -> Sensitivity:
    # Half of the windows: weights gather on few tokens, and a hessian of weighted tokens alone says too little.
    count = max(1, min(windows.shape[0] // 2, SENSITIVITY_TOKENS // windows.shape[1]))
    together = max(1, BACKWARD_TOKENS // windows.shape[1])

    def compute() -> dict[str, torch.Tensor]:
        with progress("sensitivity", 2 * len(skeleton.layers)) as step:
            result = output_sensitivity(
                skeleton, list(windows[:count].split(together)), seed=seed, scratch=work.scratch(), progress=step
            )
        tokens = {TOKENS + name: weights for name, weights in result.tokens.items()}
        return {**result.outputs, EMBEDDING: result.embedding, **tokens}

    found = work.tensors("sensitivity", compute)
    embedding = found.pop(EMBEDDING)
    tokens = {name.removeprefix(TOKENS): found.pop(name) for name in list(found) if name.startswith(TOKENS)}
    return Sensitivity(found, embedding, tokens)
