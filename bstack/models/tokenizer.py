"""The tokenizer's files, as transformers writes them, so that they can travel inside the container."""

from __future__ import annotations

from pathlib import Path

__all__ = ["export"]


def export(target: Path, source: Path, **kwargs: str) -> list[str]:
    """Write tokenizer and generation settings of a checkpoint into a folder.

    Parameters
    ----------
    target : Path
        An existing, empty folder.
    source : Path
        The checkpoint's folder.
    **kwargs
        Passed to transformers (``gguf_file``).

    Returns
    -------
    list of str
        Names of the files written, sorted; without a tokenizer only generation_config.json, or nothing.
    """
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
        # For a folder without a vocabulary transformers makes up a tokenizer that knows its special tokens alone.
        if tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}:
            tokenizer.save_pretrained(target)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        # No tokenizer in the folder: transformers says so in many ways. The model stays usable with token ids,
        # and the caller decides whether that is enough.
        for leftover in target.iterdir():
            leftover.unlink()
    try:
        GenerationConfig.from_pretrained(source).save_pretrained(target)
    except (OSError, ValueError):
        pass  # most folders have none; transformers then derives the settings from config.json
    return sorted(path.name for path in target.iterdir() if path.is_file())
