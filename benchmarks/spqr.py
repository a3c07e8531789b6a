"""What each part of SpQR brings: bits per weight of the linears and divergence, embeddings untouched.

    python benchmarks/spqr.py MODEL --calibration TEXT --text TEXT

One pass over the calibration text serves all variants; each is then measured on the first windows of the other text. The
table in docs/research/notebook.md is what this prints for SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from bstack.calibration.sensitivity import output_sensitivity
from bstack.calibration.statistics import gather
from bstack.calibration.stream import LayerStream
from bstack.calibration.texts import open_text, token_windows
from bstack.codecs.spqr import SpqrCodec
from bstack.codecs.spqr_columns import OUTLIER_COST, Damped, code_columns
from bstack.compression.encode import Matrix
from bstack.compression.layers import layer_matrices
from bstack.eval.divergence import divergence
from bstack.models.names import MatrixName
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton, layer_parameters
from bstack.numerics.groups import code_group, fit_groups


class Variant(NamedTuple):
    """Settings, and what is left out."""

    name: str
    settings: dict
    feedback: bool = True
    quantised: bool = True


VARIANTS = [
    Variant("4 bits, 4.75", {"bits": 4, "bpw": 4.75}),
    Variant("4 bits, no outliers", {"bits": 4, "outliers": 0}),
    Variant("4 bits, no feedback, 4.75", {"bits": 4, "bpw": 4.75}, feedback=False),
    Variant("4 bits, half-precision statistics, group 16", {"bits": 4, "outliers": 0.00173}, quantised=False),
    Variant(
        "4 bits, half-precision statistics, group 64", {"bits": 4, "group": 64, "outliers": 0.0055}, quantised=False
    ),
    Variant("3 bits, 3.95", {"bits": 3, "bpw": 3.95}),
    Variant("3 bits, no outliers", {"bits": 3, "outliers": 0}),
    # For models of different widths, whose other parts take different shares.
    Variant("4 bits, .5 % outliers", {"bits": 4, "outliers": 0.005}),
    Variant("3 bits, .5 % outliers", {"bits": 3, "outliers": 0.005}),
    Variant("3 bits, no feedback, 3.95", {"bits": 3, "bpw": 3.95}, feedback=False),
]


def encode(matrix: Matrix, codec: SpqrCodec, variant: Variant) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Dense part, dense part with outliers, and the bits of both."""
    weight, hessian, tokens, importance = matrix.task
    places, damped = codec.outlier_places(weight, hessian, tokens, importance)
    if not variant.feedback:
        damped = Damped(damped.order, torch.eye(len(damped.order)), hessian.diagonal()[damped.order])
    outlier_mask = places >= codec.threshold
    m, n = weight.shape
    if variant.quantised:
        _dense, values, rows, columns, added = code_columns(
            weight, damped, outlier_mask, importance, codec.bits, codec.group
        )
        whole = values.clone()
        whole[rows, columns] += added.float()
        per_group = codec.bits + 160 / (16 * codec.group)
        count = len(rows)
    else:
        values, whole = half_precision_statistics(weight, damped, outlier_mask, codec.bits, codec.group)
        per_group, count = codec.bits + 32 / codec.group, int(outlier_mask.sum())
    outlier_bits = 32 * (m + 1) + 32 * count if count else 0
    return values, whole, per_group * m * n + 16 * n + outlier_bits


def half_precision_statistics(
    weight: torch.Tensor, damped: Damped, outlier_mask: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `code_columns`, but scale and zero point of each group in 16 bits each."""
    order, max_code = damped.order, 2**bits - 1
    original = weight[:, order].t().contiguous()
    kept = torch.where(outlier_mask, OUTLIER_COST / max_code**2, 1.0)[:, order].t().contiguous()
    errors, dense = torch.empty_like(original), torch.empty_like(original)
    added = torch.empty_like(original)
    for start in range(0, len(order), group):
        here = slice(start, min(start + group, len(order)))
        target = original[here] + damped.factor[:start, here].t() @ errors[:start]
        fitted = (part.half().float()[None] for part in fit_groups(target, damped.cost[here], kept[here], max_code))
        found = code_group(
            target, original[here], damped.factor[here, here], damped.cost[here], kept[here], *fitted, max_code
        ).chosen(torch.zeros(len(weight), dtype=torch.int64))
        errors[here], dense[here], added[here] = found.errors, found.dense, found.added
    values, whole = torch.empty_like(weight), torch.empty_like(weight)
    values[:, order], whole[:, order] = dense.t(), (dense + added).t()
    return values, whole


def encode_layers(
    skeleton: Skeleton, batches: Sequence[torch.Tensor], sensitivity: object, variants: Sequence[Variant], folder: Path
) -> list[float]:
    """Write every variant's weights by layer, and return its bits per weight."""
    bits, weights = [0.0] * len(variants), 0
    with (
        skeleton.loaded(skeleton.rest_names),
        LayerStream(skeleton, batches, embedding=lambda name: skeleton.loaded([name])) as stream,
    ):
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)), torch.no_grad():
                table = gather(stream, index, layer_parameters(skeleton, index))
                matrices = list(layer_matrices(skeleton, index, table, sensitivity))
                weights += sum(matrix.weight.numel() for matrix in matrices)

                def run(variant: Variant, matrices: list[Matrix] = matrices) -> list[tuple]:
                    with torch.no_grad():
                        codec = SpqrCodec(**variant.settings, planes=0).for_layer(m.task for m in matrices)
                        return [encode(matrix, codec, variant) for matrix in matrices]

                with ThreadPoolExecutor(2) as pool:
                    for number, found in enumerate(pool.map(run, variants)):
                        named = {}
                        for matrix, (dense, whole, size) in zip(matrices, found, strict=True):
                            bits[number] += size
                            transposed = int(matrix.transposed)
                            named[f"{matrix.name} {transposed} dense"], named[f"{matrix.name} {transposed} whole"] = (
                                dense,
                                whole,
                            )
                        save_file(named, folder / f"{number}-{index}.safetensors")
            print(f"layer {index}", flush=True)
    return [total / weights for total in bits]


def put(skeleton: Skeleton, folder: Path, number: int, which: str) -> None:
    """Overwrite the loaded model's linears with a variant."""
    for index in range(len(skeleton.layers)):
        for key, tensor in load_file(folder / f"{number}-{index}.safetensors").items():
            name, transposed, kind = key.split(" ")
            if kind == which:
                matrix = MatrixName.parse(name)
                matrix.view(skeleton.parameter(matrix.parameter), transposed == "1").copy_(tensor)


def measure(
    model: torch.nn.Module, windows: torch.Tensor, original: list[torch.Tensor] | None
) -> Callable | list | str:
    """Log probabilities of each window, or a comparison with those of the original in words."""
    logits = [model(input_ids=window[None], use_cache=False).logits[0].float() for window in windows]
    if original is None:
        return [one.log_softmax(-1).half() for one in logits]
    compared = [divergence(reference.float(), one) for reference, one in zip(original, logits, strict=True)]
    log_losses = torch.stack(
        [torch.nn.functional.cross_entropy(one[:-1], window[1:]) for one, window in zip(logits, windows, strict=True)]
    )
    kl = torch.stack([one.kl.mean() for one in compared])
    top = sum(float(one.same_top.float().mean()) for one in compared) / len(compared)
    return f"{float(kl.mean()):.4f} +- {float(kl.std()) / len(kl) ** 0.5:.4f} | {math.exp(float(log_losses.mean())):.2f} | {top:.3f}"


def main() -> None:
    """Encode, then print a row for each variant and depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument(
        "--only", action="append", default=[], help="only variants with this in their name; may be given again"
    )
    given = parser.parse_args()
    variants = [one for one in VARIANTS if not given.only or any(words in one.name for words in given.only)]
    torch.set_num_threads(1)
    skeleton = Skeleton(open_checkpoint(given.model))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(skeleton.checkpoint.config.to_json_string())
        skeleton.checkpoint.export_tokenizer(folder)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        windows = token_windows(open_text(given.calibration), tokenizer, given.samples, given.length, 8)[
            : given.samples
        ]
        ids = tokenizer(open_text(given.text).text[: 100 * given.windows * given.length], add_special_tokens=False)[
            "input_ids"
        ]
        text = torch.tensor(ids[: given.windows * given.length]).view(given.windows, given.length)
        sensitivity = output_sensitivity(
            skeleton, list(windows[:4].split(2)), seed=0, scratch=folder, progress=lambda: None
        )
        bits = encode_layers(skeleton, list(windows.split(8)), sensitivity, variants, folder)
        with skeleton.loaded(list(skeleton.model.state_dict())), torch.no_grad():
            original = measure(skeleton.model, text, None)
            print("variant | bits per weight | KLD | perplexity | same top")
            for number, variant in enumerate(variants):
                for which in ("whole", "dense"):
                    if which == "dense" and (
                        variant.settings.get("outliers") == 0 or not variant.feedback or not variant.quantised
                    ):
                        continue
                    put(skeleton, folder, number, which)
                    label = variant.name if which == "whole" else f"{variant.name}: dense part alone"
                    print(f"{label} | {bits[number]:.4f} | {measure(skeleton.model, text, original)}", flush=True)


if __name__ == "__main__":
    main()
