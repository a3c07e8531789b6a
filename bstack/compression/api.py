"""Compress a model: statistics -> blocks with the error each removes -> order -> container. Resumable."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bstk
from bstack.errors import require
from bstack.memory.process import peak_bytes
from bstack.progress import Plan, Progress, no_progress
from bstack.settings import PRESETS, Settings
from bstk.atomic import require_free, target_of
from bstk.errors import UsageError, os_errors

__all__ = ["Report", "compress"]


@dataclass(frozen=True)
class Report:
    """What a compression made; sizes in bytes.

    Attributes
    ----------
    original_bytes
        Weight files of the original.
    original_dtype, original_dtype_bytes
        The precision of the original's weights, and what all of them take in it: bfloat16 for a quantised source.
    source_quantisation
        How the weight files are quantised, such as ``GGUF Q4_1``; None for floats.
    file_bytes, base_bytes
        The file at full length, and cut to its base model.
    memory_bytes
        Weights of the full model in memory, as blocks.
    exact_bytes
        Of the file, what restores the original; 0 without it.
    linears, blocks
        Matrices that became stacks, and all their blocks.
    bits_per_weight
        Of those matrices at full depth, everything in the blocks counted.
    seconds, peak_memory_bytes
        Of this process; a resumed run counts from its resumption.
    """

    output: str
    original_bytes: int
    original_dtype: str
    original_dtype_bytes: int
    source_quantisation: str | None
    file_bytes: int
    base_bytes: int
    memory_bytes: int
    exact_bytes: int
    linears: int
    blocks: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def compress(
    model: str | Path,
    output: str | Path,
    *,
    settings: Settings = PRESETS["default"],
    work_dir: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dask: str | None = None,
    progress: Progress = no_progress,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> Report:
    """Compress a model into one .bstk file.

    Parameters
    ----------
    model : str or Path
        A transformers folder, a GGUF file, a hub id, or ``smollm2``.
    output : str or Path
        The file to write; it appears whole or not at all.
    settings : Settings
        What to do.
    work_dir : str or Path, optional
        Keeps finished parts until the output is written; ``OUTPUT.work`` by default. After an interruption the same
        call resumes from it.
    overwrite : bool
        Whether an existing output may be replaced.
    trust_remote_code : bool
        Whether Python code that the model brings along may run; a `bstack.errors.ForeignCodeWarning` says which.
    dask : str, optional
        Address of a Dask scheduler whose workers encode the matrices; by default threads of this process do. The file is the same.
    progress : callable
        Receives each stage and its steps.
    on_plan : callable
        Called once, before the work begins, with its `bstack.progress.Plan`: about how much memory it will take.

    Raises
    ------
    bstk.BstkError
        One of its subclasses for everything that a user can correct; see `bstack.errors`.
    """
    require("Compressing")
    started = time.monotonic()
    output = Path(output)
    _check_output(output, overwrite)
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise UsageError(f"{output} is the model itself.", hint="Name another file to write.")
    if settings.device != "cpu" and dask is not None:
        raise UsageError(
            f"device is {settings.device} and dask is {dask}; a cluster's workers encode on their CPUs.",
            hint="Leave one of them out.",
        )
    # Heavy imports, after the arguments were checked.
    from bstack.compression.cluster import Cluster
    from bstack.compression.device import Device
    from bstack.compression.encode import Threads
    from bstack.compression.stages import run_stages

    work_path = Path(work_dir) if work_dir is not None else output.with_name(output.name + ".work")
    on_device = settings.device != "cpu"
    with Device(settings.device) if on_device else Threads() if dask is None else Cluster(dask) as workers:
        result = run_stages(str(model), settings, work_path, workers, progress, trust_remote_code, on_plan)
    try:
        _check_output(output, overwrite)  # another run may have written it in the meantime
        with progress("write", 1) as step:
            bstk.write(output, result.metadata, result.entries, result.base_count)
            step()
        with bstk.open(output, strict=True) as file:
            report = _report(output, file, time.monotonic() - started)
    except BaseException:
        result.work.release()
        raise
    result.work.remove()
    return report


def _check_output(output: Path, overwrite: bool) -> None:
    folder = Path(target_of(output)).parent
    if not overwrite:
        require_free(output)
    with os_errors(str(output.parent)):
        tempfile.TemporaryFile(dir=folder).close()


def _report(output: Path, file: bstk.Reader, seconds: float) -> Report:
    model = file.metadata["model"]
    blocks = [chunk for chunk in file.chunks if chunk.is_block]
    return Report(
        output=str(output),
        original_bytes=model["original_bytes"],
        original_dtype=model["original_dtype"],
        original_dtype_bytes=model["original_dtype_bytes"],
        source_quantisation=model.get("source_quantisation"),
        file_bytes=file.length,
        base_bytes=file.base_length,
        memory_bytes=file.memory_bytes,
        exact_bytes=file.length - file.model.file_bytes,
        linears=sum(chunk.level == 0 for chunk in blocks),
        blocks=len(blocks),
        bits_per_weight=file.bits_per_weight() or 0.0,
        seconds=seconds,
        peak_memory_bytes=peak_bytes(),
    )
