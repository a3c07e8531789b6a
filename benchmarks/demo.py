"""The main job on the embedded default model, as `make demo` runs it: compress, inspect, cut, verify, generate."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import bstack
import bstk
from bstack.bench.child import isolated_environment

FOLDER = Path("demo")
FULL = FOLDER / "smollm2.bstk"
PROMPT = "Why is the sky blue?"
FRACTIONS = (0.75, 0.5, 0.35)


def main() -> int:
    """Run every step and print the commands; stop at the first that fails."""
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    if FULL.exists():
        print(f"{FULL} is there already and is used again; `make clean` starts over.")
    else:
        _bstack("compress", "smollm2", "-o", str(FULL))
    _bstack("inspect", str(FULL))
    cuts = []
    for mb in _sizes():
        cut = FOLDER / f"smollm2-{mb}mb.bstk"
        _bstack("truncate", str(FULL), "--mb", str(mb), "-o", str(cut), "--force")
        cuts.append(cut)
    for file in (FULL, *cuts):
        _bstack("verify", str(file))
    for file in (FULL, cuts[0]):
        _generate(file)
    print(f"\nDone in {time.monotonic() - started:.0f} s. The files are in {FOLDER}/.")
    return 0


def _bstack(*arguments: str) -> None:
    print(f"\n$ bstack {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-P", "-m", "bstack", *arguments], env=isolated_environment())
    if done.returncode:
        sys.exit(done.returncode)


def _sizes() -> list[int]:
    with bstk.open(FULL) as file:
        smallest, full = file.base.budget / bstk.MB, file.complete.budget / bstk.MB
    return [round(smallest + fraction * (full - smallest)) for fraction in FRACTIONS]


def _generate(path: Path) -> None:
    print(f"\n>>> model, tokenizer = bstack.load({str(path)!r})", flush=True)
    model, tokenizer = bstack.load(path)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**chat, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(written[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{PROMPT}\n{answer.strip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
