"""The tokenizer of a model: read as transformers reads it, carried so that it gives the same ids, held against the embedding."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bstack.errors import UnsupportedModelError, one_line
from bstack.models.files import MODEL_SUFFIXES, POINTER, is_model_file, is_pointer
from bstack.models.weight_files import read_json
from bstk.errors import BstkError, os_errors

__all__ = ["check_ids", "export_tokenizer", "tokenizer_files"]

# Names of files that tokenizers are read from, those that hold a vocabulary first.
_NAMES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model*",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "vocab*.json",
)
_SETTINGS = "tokenizer_config.json"
_NAMES += ("vocab.txt", "merges.txt", "*.bpe", "*.codes", "*.vocab", _SETTINGS)
# Others that change what a tokenizer gives.
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
# Words, spaces, digits, signs and scripts, which tokenizers treat in their own ways.
_SAMPLE = "The river  carried 1,234.5 stones; don't\tcount them: \u00fcber \u6771\u4eac \U0001f642\n\n def f(x):\n    return x"


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Return the names of files that a tokenizer is read from."""
    names = sorted(names)
    return list(dict.fromkeys(name for pattern in _NAMES for name in fnmatch.filter(names, pattern)))


def export_tokenizer(
    target: Path,
    source: Path,
    trusted: bool = False,
    display_name: Path | None = None,
    complete: Callable[[Any], None] = lambda tokenizer: None,
    **gguf: str,
) -> None:
    """Write the tokenizer of a checkpoint's folder into a folder that holds the model's config.json.

    It is written as transformers saves it, or, where transformers then reads another one, as the files that it was read from.

    Parameters
    ----------
    target, source : Path
        A source without a tokenizer leaves the target as it is.
    trusted : bool
        Let Python code in the source run.
    display_name : Path, optional
        What messages call the source.
    complete : callable
        Called with the tokenizer as transformers read it; may change it.
    **gguf
        ``gguf_file``, the name of a GGUF file in the source that holds a tokenizer.

    Raises
    ------
    bstack.errors.UnsupportedModelError
        The source has a tokenizer that transformers cannot read, or that no container can carry.
    """
    from transformers import AutoTokenizer

    shown = display_name or source
    files = list(gguf.values()) or tokenizer_files(path.name for path in source.iterdir() if path.is_file())
    if not files:
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trusted, **gguf)
        # For files that it does not know transformers makes a tokenizer with special tokens only.
        words = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
        problem = None if words else "transformers finds no words in it"
        complete(tokenizer)
    except (KeyboardInterrupt, SystemExit, MemoryError, BstkError):
        raise
    except BaseException as error:  # also a panic of the tokenizers library, which is no Exception
        problem = one_line(error).rstrip(": .")
    if problem and (pointers := [file for file in files if is_pointer(source / file)]):
        problem = f"{pointers[0]} is {POINTER}"
    if problem:
        raise UnsupportedModelError(
            f"{shown / files[0]}: the tokenizer cannot be read: {problem}.",
            hint=(
                "Put a good tokenizer.json there (for other forms transformers needs the package sentencepiece "
                "or tiktoken), or leave the tokenizer out."
            ),
            option="tokenizer",
        )
    with tempfile.TemporaryDirectory(prefix="bstack-") as name, os_errors(str(target)):
        saved, copied = Path(name) / "saved", Path(name) / "copied"
        for folder in (saved, copied):
            folder.mkdir()
            shutil.copy(target / "config.json", folder)
        _save(tokenizer, saved)
        best = saved
        # transformers keeps code that it runs under the name of its folder, so a second copy would be other code.
        if not trusted and not _is_read(saved, tokenizer):
            if gguf:
                _take_as_it_is(saved)
            else:
                best = copied
                for file in [*files, *_BESIDE]:
                    if (source / file).is_file():
                        shutil.copy(source / file, copied)
                # A mark of what transformers saved, which says all in tokenizer.json.
                _change_settings(copied, lambda settings: settings.pop("backend", None))
            if not _is_read(best, tokenizer):
                raise UnsupportedModelError(
                    f"{shown / files[0]}: neither a copy of the tokenizer nor what transformers saves of it "
                    "gives the same token ids.",
                    hint="Save the tokenizer with transformers first, or leave it out.",
                    option="tokenizer",
                )
        # Further chat templates are in a folder of their own. transformers copies code there too, which stays out.
        found = [path for path in best.rglob("*") if path.is_file() and path.suffix != ".py"]
        for path in found:
            inside = path.relative_to(best)
            if not is_model_file(inside.as_posix()):
                raise UnsupportedModelError(
                    f"{shown}: its tokenizer writes {inside}. bstack packs files that end in "
                    f"{', '.join(MODEL_SUFFIXES)}.",
                    hint="Leave the tokenizer out.",
                    option="tokenizer",
                )
            (target / inside).parent.mkdir(exist_ok=True)
            shutil.copy(path, target / inside)


def _take_as_it_is(folder: Path) -> None:
    """Have transformers take a saved tokenizer.json as it is: classes such as GPT2Tokenizer cut text in a way of their own."""
    _change_settings(folder, lambda settings: settings.update(tokenizer_class="TokenizersBackend"))


def _change_settings(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    if settings := read_json(folder / _SETTINGS):
        change(settings)
        (folder / _SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def _save(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # The tokenizers library raises bare Exceptions, whose text ends in the system's error number.
        if number := re.search(r"\(os error (\d+)\)$", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise


def _is_read(folder: Path, tokenizer: Any) -> bool:
    """Return whether transformers reads that tokenizer from a folder: the same words, ids and templates."""
    from transformers import AutoTokenizer

    sample = " ".join([_SAMPLE, *tokenizer.all_special_tokens])

    def results(of: Any) -> tuple[Any, ...]:
        try:
            ids = [of(sample, add_special_tokens=special)["input_ids"] for special in (True, False)]
            read: Any = ids, of.decode(ids[0])
        except Exception as error:  # one without a token for unknown words raises a bare Exception
            read = str(error)
        return read, of.get_vocab(), of.special_tokens_map, of.chat_template

    try:
        return results(AutoTokenizer.from_pretrained(folder)) == results(tokenizer)
    except (
        Exception
    ):  # whatever transformers or the tokenizers library raise for files that are not those of a tokenizer
        return False


def check_ids(ids: Any, rows: int, tokenizer: Any, source: str) -> None:
    """Refuse token ids that an embedding does not have.

    Parameters
    ----------
    ids : torch.Tensor or np.ndarray
        int64, any shape, not empty.
    rows : int
        Of the embedding.
    tokenizer : transformers.PreTrainedTokenizerBase or bstack.engine.native.generate.TextTokenizer
        Where they come from.
    source : str
        The text, for the message.

    Raises
    ------
    bstack.errors.UnsupportedModelError
    """
    if (largest := int(ids.max())) >= rows:
        raise UnsupportedModelError(
            f"{source}: the tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest}, "
            f"but the model's embedding has {rows} rows, ids 0 to {rows - 1}.",
            hint=(
                "Take a text without that token, the tokenizer that belongs to this model, or the model after "
                "resize_token_embeddings."
            ),
        )
