"""A checkpoint's files beside its weights in a folder of their own, with the code that may run and no other."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bstack.models.code import Code, put_code
from bstk.errors import writing

__all__ = ["staged"]

# Endings of weights, in the formats that models are published in.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


def staged(folder: Path, code: Code) -> Path:
    """Copy what is beside the weights of a checkpoint, and put the code there.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    code : Code
        With the modules that it needs.

    Returns
    -------
    Path
        A folder alone in a temporary one, which the caller deletes.

    Raises
    ------
    bstk.ResourceError, bstk.OutputError
        It cannot be written.
    """
    temporary = Path(tempfile.mkdtemp(prefix="bstack-"))
    target = temporary / "model"  # the same each time: transformers keeps code that it runs under the folder's name
    try:
        with writing(str(target)):
            target.mkdir()
            for file in folder.rglob("*"):
                inside = file.relative_to(folder)
                if file.is_file() and file.suffix not in WEIGHTS and not any(part.startswith(".") for part in inside.parts):
                    (target / inside).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target / inside)
            put_code(code, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target
