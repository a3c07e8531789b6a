"""The model card of a container: what it is, its quality by size, how to fetch a cut, where it comes from."""

from __future__ import annotations

import io
import math
import re
from typing import Any
from urllib.parse import quote

import bstk
from bstack.errors import printable
from bstack.hub.curve import curve
from bstk import MB

__all__ = ["CARD", "PICTURE", "base_model_of", "draw_curve", "model_card"]

CARD, PICTURE = "README.md", "curve.png"

_CARD = """\
# {title}

A language model compressed with bstack into one file, [{file}](./{link}), that can be cut to any size from {smallest} to {largest} MB \
(1 MB is 2^20 bytes). Its blocks are sorted by how much each of them helps, so every first part of it is a working model, and a larger \
part is closer to the original. Fetch what fits.
{exact}
{quality}
## Use

Install bstack with its extra `http` (in its source folder `pip install '.[http]'`), then:

```console
$ bstack run hf://{repository} {chat}-p "What is a prime number?"    # as much of it as fits into free memory
$ bstack run hf://{repository} --mb {mb} {chat}-p "Hello"
{cut}```

```python
import bstack  # before from_pretrained; pip install bstack[compress,http]

from transformers import AutoModelForCausalLM, AutoTokenizer

settings = {{"quant_method": "bstack", "mb": {mb}}}  # MB of memory for the weights, which stay packed; without mb all of them
model = AutoModelForCausalLM.from_pretrained("{repository}", quantization_config=settings)
tokenizer = AutoTokenizer.from_pretrained("{repository}")
```

The root digest authenticates the file and every cut of it:

```
{root}
```

## Original

{original}
"""


_EXACT = """
The complete file, {whole} MB, holds the original's files of weights too, bit for bit: `bstack export hf://{repository} original/` writes \
them and checks their SHA-256.
"""

_CUT = """\
$ bstack truncate hf://{repository} --mb {mb} -o small.bstk    # fetches {mb} MB
$ bstack grow small.bstk --mb {more} --from hf://{repository}    # fetches the next {step} MB
$ bstack verify small.bstk --root {root}
"""


def model_card(file: bstk.Reader, name: str, repository: str, base_model: str | None, licence: str | None) -> str:
    """Return the card of a container in a hub's repository, with its header in YAML.

    Parameters
    ----------
    file : bstk.Reader
    name : str
        What the file is called there.
    repository : str
        ``owner/name``.
    base_model, licence : str or None
        The original's hub id, and its licence by the hub's identifier.
    """
    from huggingface_hub import ModelCardData

    model = file.metadata.get("model")
    model = model if isinstance(model, dict) else {}
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        license=licence,
        library_name="bstack",
        pipeline_tag="text-generation",
        tags=["bstack", "compressed"],
    )
    # Of blocks: what restores the original makes no model of blocks a better one.
    least, most = file.base.budget, file.model.budget
    mb = max(math.ceil((least + most) / 2 / MB), math.ceil(least / MB))
    more = math.ceil((mb + math.ceil(most / MB)) / 2)
    sizes = {"mb": mb, "more": more, "step": more - mb}
    known = {"repository": repository, "root": file.root.hex()}
    original = str(base_model or model.get("name") or "the original")
    text = _CARD.format(
        title=f"{_plain(original.rpartition('/')[2])}, cut to any size",
        file=_code(name),
        link=quote(name),
        smallest=bstk.mb_ceil(least),
        largest=bstk.mb_ceil(most),
        exact=_EXACT.format(whole=bstk.mb_ceil(file.length), repository=repository) if file.restores else "",
        quality=_quality(file),
        chat="--chat " if "chat_template.jinja" in file.files else "",
        mb=mb,
        cut=_CUT.format(**sizes, **known) if more > mb else "",
        **known,
        original=_original(model, base_model, licence),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n\n{text}"


def base_model_of(file: bstk.Reader) -> str | None:
    """Return the hub id that a container was made from; None for a folder or a GGUF file."""
    model = file.metadata.get("model")
    name = str(model.get("name", "")) if isinstance(model, dict) else ""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(@.+)?", name, re.ASCII)
    return found[1] if found else None


def draw_curve(file: bstk.Reader) -> bytes | None:
    """Draw the divergence by size as a PNG; None for a file without a curve."""
    points = [
        (p["file_bytes"] / MB, p["kld"], p.get("kld_se"))
        for p in curve(file.metadata)
        if isinstance(p.get("kld"), (int, float)) and 0 < p["kld"] < math.inf
    ]
    if not points:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    sizes, divergences, errors = zip(*points, strict=True)
    # Downwards at most half of the value, because a logarithmic axis has no zero.
    upper = [max(error, 0) if isinstance(error, (int, float)) else 0 for error in errors]
    lower = [min(error, value / 2) for error, value in zip(upper, divergences, strict=True)]
    axes.errorbar(sizes, divergences, yerr=[lower, upper], color="#0072B2", marker="o", capsize=2)
    axes.set_yscale("log")
    axes.set_xlabel("size of the cut, MB (2²⁰ bytes)")
    axes.set_ylabel("KL divergence from the original\nnats per token")
    axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})  # the same file gives the same bytes
    return picture.getvalue()


def _quality(file: bstk.Reader) -> str:
    points = curve(file.metadata)
    if not points:
        return "Its quality was not measured when it was made.\n"
    rows = [
        [
            f"{point['file_bytes'] / MB:,.1f}",
            _number(point.get("bits_per_weight"), 2),
            _number(point.get("kld"), 4),
            _number(point.get("same_top"), 3),
            _number(point.get("perplexity"), 2),
        ]
        for point in points
    ]
    head = ["MB", "bits per weight", "KL divergence", "same top token", "perplexity"]
    lines = [head, ["---:"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = _plain(file.metadata.get("quality_text") or "held-out text")
    return (
        f"![KL divergence from the original by size]({PICTURE})\n\n{table}\n\nMeasured when the model was compressed, on {text}: the "
        "mean Kullback-Leibler divergence of the next token from the original, in nats per token, and the fraction of tokens for "
        "which both find the same one likeliest.\n"
    )


def _original(model: dict[str, Any], base_model: str | None, licence: str | None) -> str:
    lines = []
    if base_model:
        lines.append(f"- Made from [{base_model}](https://huggingface.co/{base_model}).")
    elif model.get("name"):
        lines.append(f"- Made from {_plain(model['name'])}.")
    lines.append(
        f"- Licence: {_plain(licence)}, that of the original."
        if licence
        else "- The original's licence holds; it was not named when this card was written."
    )
    if isinstance(parameters := model.get("parameters"), int):
        lines.append(f"- {_plain(model.get('architecture') or 'A model')} with {parameters:,} parameters.")
    size = model.get("original_dtype_bytes")
    if isinstance(size, int):
        quantised = model.get("source_quantisation")
        copy = f"; it was made from a copy quantised as {_plain(quantised)}" if quantised else ""
        lines.append(f"- {size / MB:,.0f} MB as {_plain(model.get('original_dtype'))}{copy}.")
    source = model.get("source")
    files = source.get("files") if isinstance(source, dict) else None
    for entry in files if isinstance(files, list) else []:
        if isinstance(entry, dict) and "sha256" in entry:
            lines.append(f"- Source file {_plain(entry.get('name'))}, SHA-256 {_code(entry['sha256'])}.")
    return "\n".join(lines)


def _number(value: object, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else "-"


def _code(value: object) -> str:
    """Return text as code in Markdown, which has no escapes: between more backticks than it has in a row."""
    text = printable(value).replace("\n", " ")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _plain(value: object) -> str:
    """Return text of the metadata without what Markdown acts on, addresses too."""
    return re.sub(r"([\\`*_\[\]<>|#:])", r"\\\1", printable(value).replace("\n", " "))
