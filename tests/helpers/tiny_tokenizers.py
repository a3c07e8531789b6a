"""Tiny tokenizers in the forms in which checkpoints bring them, written into a folder."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import tiny_models

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MERGED = (b"th", b"he", b"the", b"er", b"in", b" t", b" the", b"st")
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *MERGED])}


def tekken(folder: Path) -> None:
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    sizes = {"num_vocab_tokens": len(RANKS), "default_vocab_size": len(RANKS) + len(special)}
    content = {
        "config": {"pattern": PATTERN, **sizes, "default_num_special_tokens": len(special), "version": "v3"},
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
            for token, rank in RANKS.items()
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def tiktoken(folder: Path, name: str = "tokenizer.model") -> None:
    (folder / name).write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()))


def sentencepiece(folder: Path, name: str = "tokenizer.model", kind: str = "unigram") -> None:
    """Needs the package sentencepiece, to train."""
    import sentencepiece as library

    made = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_models.text().split("\n")),
        model_writer=made,
        vocab_size=90,
        hard_vocab_limit=False,
        model_type=kind,
        minloglevel=2,
    )
    (folder / name).write_bytes(made.getvalue())


def vocabulary_and_merges(folder: Path) -> None:
    tiny_models.add_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def words(folder: Path) -> None:
    found = sorted(set(tiny_models.text().replace(".", " . ").replace(",", " , ").split()))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *found, ""]))


def configured(folder: Path, kind: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
