"""Try every causal architecture."""

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
import architectures as A

args = sys.argv[1:]
debug = "--debug" in args
part = [a for a in args if "/" in a]
names = [a for a in args if not a.startswith("-") and "/" not in a] or A.KINDS
if part:
    i, n = map(int, part[0].split("/"))
    names = names[i::n]
for kind in names:
    with tempfile.TemporaryDirectory() as f:
        r = A.try_out(kind, Path(f) / "x", debug)
    print(f"{r.kind:28} {r.outcome:13} {r.seconds:5.1f} {r.step:6} {r.detail[:330]}", flush=True)
