"""Try every causal architecture of the installed transformers, and write down what works.

    python tests/sweep_architectures.py                       # all, some ten minutes on two cores; writes the page
    python tests/sweep_architectures.py olmo3 mamba           # these, without writing

Ends with 1 if one fails: it works, or it is refused by name before any work.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "research" / "architectures.md"

HEAD = """# Architectures

Every causal architecture of transformers {version}, each as a tiny random model: {counts}. Written by `tests/sweep_architectures.py`; a part of it runs
with the tests.

**It works** means: compressed with a text of its own, every weight comes back within the error of the codec, the original with the decoded
weights has the logits of the dense model, and the packed and the exported model have them too. It says nothing of the quality of real models.
**It is refused** means: by name, before any work. **Not tried** means that transformers itself did not make or run the tiny model; where it
is a part of a larger model, the other parts are left out.
"""


def attempt(kind: str) -> tuple[str, str, str]:
    import transformers

    sys.path.insert(0, str(Path(__file__).parent / "helpers"))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    logging.disable()
    import architectures

    with tempfile.TemporaryDirectory() as folder:
        return tuple(architectures.try_out(kind, Path(folder)))


def page(found: list[tuple[str, str, str]]) -> str:
    import transformers

    def of(outcome: str) -> list[tuple[str, str]]:
        return [(kind, detail) for kind, came, detail in found if came == outcome]

    outcomes = [outcome for outcome in ("works", "refused", "fails", "not tried") if of(outcome)]
    counts = ", ".join(f"{len(of(outcome))} {outcome.replace('works', 'work')}" for outcome in outcomes)
    text = HEAD.format(version=transformers.__version__, counts=counts)
    fused = [f"`{kind}`" for kind, detail in of("works") if detail]
    text += f"\n## Works\n\nWith the fused step of decoding: {', '.join(fused)}.\n\n"
    text += "With their own code: " + ", ".join(f"`{kind}`" for kind, detail in of("works") if not detail) + ".\n"
    for outcome in outcomes[1:]:
        text += f"\n## {outcome.capitalize()}\n\n| model type | why |\n|---|---|\n"
        for kind, detail in of(outcome):
            text += f"| `{kind}` | {detail.replace('|', '/').replace('<', '&lt;').replace('`', '')} |\n"
    return text


def main(kinds: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(__file__).parent / "helpers"))
    import architectures

    found = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for kind, outcome, detail in pool.map(attempt, kinds or architectures.KINDS):
            print(f"{kind:28} {outcome:10} {detail}", flush=True)
            found.append((kind, outcome, detail))
    if not kinds:
        PAGE.write_text(page(found), encoding="utf-8")
    return int(any(outcome == "fails" for _, outcome, _ in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
