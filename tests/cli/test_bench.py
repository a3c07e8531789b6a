"""``bstack bench`` on a tiny model: in this process, and so is what it asks of others, but where processes are the matter."""

import contextlib
import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree

import in_process
import pytest

import bstk
from bstack.cli import main

pytestmark = pytest.mark.slow

SMALL = ("--windows", "3", "--sequence-length", "40")


@pytest.fixture(scope="module")
def home(tiny_llama, tmp_path_factory):
    """A folder with ``model.bstk`` and an empty cache."""
    import bstack

    folder = tmp_path_factory.mktemp("bench")
    settings = bstack.Settings(codec="sign", planes=6, samples=8, sequence_length=32)
    bstack.compress(tiny_llama, folder / "model.bstk", settings=settings)
    return folder


@pytest.fixture(scope="module")
def sizes(home):
    """Budgets: the smallest, one between, the whole."""
    with bstk.open(home / "model.bstk") as file:
        first, last = file.base.budget, file.fit().budget
    return [f"{size / bstk.MB:.20f}" for size in (first, (first + last) // 2, last)]


def run_here(home, *args, file="model.bstk", **options):
    return in_process.bstack("bench", file, *args, cwd=home, **{"XDG_CACHE_HOME": str(home / "cache"), **options})


@pytest.fixture
def bench(home, monkeypatch):
    """Run ``bstack bench model.bstk`` -> CompletedProcess; it measures in this process, too."""
    monkeypatch.setattr("bstack.bench.run.ask", in_process.measure)
    return functools.partial(run_here, home)


_installed = shutil.which("bstack", path=sysconfig.get_path("scripts"))
COMMAND = [_installed] if _installed else [sys.executable, "-m", "bstack"]


def ENVIRONMENT(home):
    return {**os.environ, "PYTHONUTF8": "1", "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def everything(home, tiny_llama, sizes):
    ask = ["--budgets", ",".join(sizes), "--original", tiny_llama, *SMALL]
    against = ["--against", "rtn:4,gptq:4", "--calibration", "self"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bstack.bench.run.ask", in_process.measure)
        done = run_here(home, *ask, *against, "--json", "--csv", "all.csv", "--plot", "all.svg")
    assert (done.returncode, done.stderr) == (0, "all.csv: written\nall.svg: written\n"), done.stderr
    return json.loads(done.stdout)


def test_json_has_all_figures(everything, home, sizes):
    assert everything["schema"] == "bstack.bench/1"
    assert everything["reference"] == "original" and everything["file"] == "model.bstk"
    assert everything["text"]["windows"] == 3 and len(everything["text"]["sha256"]) == 64
    assert 0 < everything["original"]["noise_floor"]["kld"]["value"] < 0.05
    with bstk.open(home / "model.bstk") as file:
        assert everything["root"] == file.root.hex()
        for point, size in zip(everything["points"], sizes, strict=True):
            cut = file.fit(mb=size)
            assert (point["file_bytes"], point["memory_bytes"]) == (cut.file_bytes, cut.memory_bytes)
            assert point["bits_per_weight"] == file.bits_per_weight(cut)
    for point in everything["points"]:
        assert set(point) == {
            "budget_mb",
            "file_bytes",
            "memory_bytes",
            "bits_per_weight",
            "perplexity",
            "kld",
            "kld_99",
            "same_top",
            "load_seconds",
            "start_memory_bytes",
            "held_memory_bytes",
            "peak_memory_bytes",
            "speed",
            "tasks",
        }
        for figure in ("perplexity", "kld", "kld_99", "same_top"):
            assert point[figure]["value"] >= 0 and point[figure]["standard_error"] >= 0
        speed = point["speed"]
        assert speed["prompt"]["value"] > 0 and speed["decode"]["value"] > 0
        assert (speed["engine"], speed["unfused"]) == ("native", None)
        assert speed["prompt_tokens"] + 1 + speed["decoded_tokens"] <= 128 and speed["decoded_tokens"] > 8
        assert point["load_seconds"] > 0 and 0 <= point["held_memory_bytes"] <= point["peak_memory_bytes"]
        assert point["start_memory_bytes"] > 2**20
    klds = [point["kld"]["value"] for point in everything["points"]]
    assert klds == sorted(klds, reverse=True) and klds[2] < klds[0] / 4


def test_float32_weights_run_beside_the_packed_ones(everything):
    file, original = everything["dense"]
    assert (file["name"], original["name"]) == ("file", "original")
    assert file["file_bytes"] == everything["points"][-1]["file_bytes"] and original["file_bytes"] is None
    assert file["load_seconds"] > 0 and original["load_seconds"] is None
    for dense in (file, original):
        assert dense["speed"]["decode"]["value"] > 0 and dense["peak_memory_bytes"] >= 0


def test_another_engine_and_a_lost_fused_step_are_named(bench, sizes, monkeypatch):
    from bstack.engine.native.architecture import NotNativeError

    def refuse(config):
        raise NotNativeError("it is not known")

    monkeypatch.setattr("bstack.engine.native.load.describe", refuse)
    monkeypatch.setattr("bstack.engine.llama_step.install", lambda model, lock: "its modules have hooks")
    done = bench("--budgets", sizes[0], "--no-quality")
    assert done.returncode == 0 and "transformers engine" in done.stdout, done.stderr
    assert "without the fused step: its modules have hooks." in done.stdout


def test_figures_are_those_of_a_plain_computation(everything, home, tiny_llama, sizes):
    """Perplexity, divergence and tops of one size with transformers, torch in float64, and the text's first tokens."""
    import math
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bstack

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(tiny_llama)(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[:120]).view(3, 40)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model, _ = bstack.load(home / "model.bstk", mb=sizes[1])
    with torch.no_grad():
        p, q = (m(windows).logits[:, :-1].double().log_softmax(-1) for m in (original, model))
    found = everything["points"][1]
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["kld"]["value"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kld"]["standard_error"] == pytest.approx(float(kl.mean(1).std()) / math.sqrt(3), rel=1e-2)
    assert found["kld_99"]["value"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-2)
    assert found["same_top"]["value"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    nll = -q.gather(-1, windows[:, 1:, None]).mean()
    assert found["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-4)


def test_baselines_and_comparisons(everything):
    found = {(b["method"], b["bits"], b["embedding_bits"]): b for b in everything["baselines"]}
    assert set(found) == {("rtn", 4, 8), ("rtn", 4, 4), ("gptq", 4, 8), ("gptq", 4, 4)}
    assert found["rtn", 4, 8]["file_bytes"] > found["rtn", 4, 4]["file_bytes"]
    for compared in everything["comparisons"]:
        assert compared["file_bytes"] <= compared["baseline_bytes"]
        assert compared["quality"]["kld"]["value"] > 0


def test_csv_is_one_row_for_each_point_and_baseline(everything, home):
    rows = list(csv.DictReader(io.StringIO((home / "all.csv").read_text(encoding="utf-8"))))
    assert [row["series"] for row in rows][:5] == ["bstack"] * 3 + ["file, float32", "original, float32"] and len(
        rows
    ) == 9
    assert float(rows[4]["decode_tokens_per_second"]) == everything["dense"][1]["speed"]["decode"]["value"]
    for row, point in zip(rows, everything["points"], strict=False):
        assert float(row["kld"]) == point["kld"]["value"] and float(row["kld_se"]) == point["kld"]["standard_error"]
        assert int(row["file_bytes"]) == point["file_bytes"] and row["reference"] == "original"
        assert float(row["decode_tokens_per_second"]) == point["speed"]["decode"]["value"]


def test_the_picture_is_one(everything, home):
    picture = ElementTree.parse(home / "all.svg").getroot()
    assert picture.tag.endswith("svg")
    assert not [path.name for path in home.iterdir() if path.name.endswith(".part")]


def test_tables_for_people(bench, sizes, tiny_llama, home):
    done = bench("--budgets", sizes[1], "--original", tiny_llama, *SMALL, "--plot", "a.png")
    assert (done.returncode, done.stderr) == (0, "a.png: written\n")
    assert "python-reference" in done.stdout and "KLD to original" in done.stdout and "±" in done.stdout
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert (
        len(tables) == 8
        and tables[-1].startswith("| original, float32")
        and all(re.fullmatch(r"\| (.+ \| )*.+ \|", line) for line in tables)
    )
    assert (home / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plus_minus_for_terminals_that_have_no_sign(bench, sizes):
    done = bench("--budgets", sizes[1], "--no-quality", encoding="ascii")
    assert done.returncode == 0 and "+/-" in done.stdout and "±" not in done.stdout
    assert "perplexity" not in done.stdout and "decode(" in done.stdout


def test_against_itself_when_no_original_is_given(bench, sizes):
    done = bench("--budgets", f"{sizes[0]},{sizes[2]}", *SMALL, "--no-speed")
    assert (done.returncode, done.stderr) == (0, "")
    assert "KLD to full file" in done.stdout and "to original" not in done.stdout and "decode(" not in done.stdout
    assert "Note: The divergence (KLD) is measured against this file at its full depth" in done.stdout


def test_csv_on_standard_output(bench, sizes):
    done = bench("--budgets", sizes[0], *SMALL, "--no-speed", "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 1 and rows[0]["reference"] == "full file" and rows[0]["load_seconds"]
    assert "measured against this file" in done.stderr


def test_equal_cuts_are_measured_once(bench, sizes):
    found = json.loads(bench("--budgets", f"{sizes[2]},99,100", "--no-quality", "--json").stdout)
    first, *others = found["points"]
    assert all({**other, "budget_mb": 0} == {**first, "budget_mb": 0} for other in others) and len(others) == 2


def test_the_original_is_read_once(bench, sizes, tiny_llama, home):
    """The second run finds the reference, and the figures stay."""
    ask = ("--budgets", sizes[1], "--original", tiny_llama, *SMALL, "--no-speed", "--json")
    first = json.loads(bench(*ask, XDG_CACHE_HOME=str(home / "other")).stdout)
    (reference,) = (home / "other" / "bstack" / "references").iterdir()
    made = reference.stat().st_ino
    assert (
        json.loads(bench(*ask, XDG_CACHE_HOME=str(home / "other")).stdout)["points"][0]["kld"]
        == first["points"][0]["kld"]
    )
    assert reference.stat().st_ino == made
    assert [path.name for path in reference.parent.iterdir()] == [reference.name]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--budgets", "60,abc"], 2, "'abc' is not a size"),
        (["--budgets", "0.000001"], 6, "The smallest budget is"),
        (["--original", "smollm3-none"], 2, "No model 'smollm3-none'"),
        (["--text", "nowhere.txt"], 2, "nowhere.txt"),
        (["--windows", "100000000"], 2, "range"),
        (["--sequence-length", "1"], 2, "range"),
        (["--against", "awq", "--original", "x"], 2, "'awq' is not a baseline"),
        (["--against", "rtn"], 2, "--original MODEL"),
        (["--calibration", "x.txt"], 2, "--against gptq"),
        (["--force"], 2, "--original: name one"),
        (["--no-quality", "--plot", "x.png"], 2, "--no-quality skips"),
        (["--plot", "x.jpg"], 2, ".png, .svg, .pdf"),
        (["--plot", "none/x.png"], 1, "there is no folder"),
        (["--csv", "model.bstk"], 2, "file to measure"),
        (["--json", "--csv", "-"], 2, "standard output"),
        (["--tasks", "arc_easy"], 1, "pip install 'bstack[tasks]'"),
    ],
)
def test_what_cannot_be_done_is_refused_first(bench, home, args, code, words):
    if "--tasks" in args:
        import importlib.util

        if importlib.util.find_spec("lm_eval"):
            pytest.skip("lm-eval is installed")
    before = (home / "model.bstk").read_bytes()
    done = bench(*args)
    assert (done.returncode, done.stdout) == (code, "") and words in done.stderr
    assert "Traceback" not in done.stderr and "bug in bstack" not in done.stderr
    assert (home / "model.bstk").read_bytes() == before


def test_spqr_at_a_target(bench, tiny_llama, sizes):
    ask = ("--budgets", sizes[1], "--original", tiny_llama, *SMALL, "--no-speed", "--calibration", "self")
    done = bench(*ask, "--against", "spqr:3@7", "--csv", "-")
    assert done.returncode == 0, done.stderr
    assert '"spqr:3@7, embeddings 8"' in done.stdout
    done = bench(*ask, "--against", "spqr:3,spqr:3@3.7")
    assert done.returncode == 2 and "against spqr:3@3.7: bpw is 3.7; with 3 bits in groups of 16" in done.stderr


def test_a_text_too_short(bench, home):
    (home / "short.txt").write_text("A few words only.")
    done = bench("--text", "short.txt")
    assert done.returncode == 1 and "16 windows of 128 need 2048" in done.stderr and "--sequence-length" in done.stderr


def test_windows_longer_than_the_model_reads(bench):
    done = bench("--windows", "2", "--sequence-length", "200")
    assert done.returncode == 2 and "sequence_length is 200, but this model reads at most 128" in done.stderr
    assert "--sequence-length" in done.stderr


def test_an_original_of_another_vocabulary(bench, home):
    import tiny_models

    other = tiny_models.save("llama", home / "other-model", vocab_size=300)
    done = bench("--original", other, *SMALL, "--no-speed", "--force")
    assert done.returncode == 2 and "vocabulary of 300" in done.stderr


def test_another_original_is_refused_unless_forced(bench, home, sizes):
    import tiny_models

    other = tiny_models.save("llama", home / "seed-1", seed=1)
    ask = ("--original", other, *SMALL, "--no-speed", "--budgets", sizes[0])
    done = bench(*ask)
    assert (done.returncode, done.stdout) == (2, "") and "set force" in done.stderr
    done = bench(*ask, "--force")
    assert done.returncode == 0 and "is not the checkpoint this file was made from" in done.stdout


def test_a_model_without_a_tokenizer(bench, home):
    import tiny_models

    import bstack

    tiny_models.save("llama", home / "mute")
    settings = bstack.Settings(codec="sign", planes=2, samples=4, sequence_length=32)
    bstack.compress(home / "mute", home / "mute.bstk", settings=settings)
    done = bench(file="mute.bstk")
    assert done.returncode == 1 and "without quality" in done.stderr and "--no-quality" in done.stderr
    assert bench("--no-quality", "--budgets", "100", file="mute.bstk").returncode == 0


def test_a_damaged_file(bench, home):
    data = bytearray((home / "model.bstk").read_bytes())
    data[-5] ^= 1
    (home / "bad.bstk").write_bytes(data)
    # What measures finds the damage, and the command says so.
    done = bench("--no-quality", "--no-speed", "--budgets", "100", file="bad.bstk")
    assert done.returncode == 5 and "SHA-256" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted(home, sizes):
    """Ctrl-C reaches parent and child, as from a terminal: exit code 75, no child left, nothing written."""
    process = subprocess.Popen(
        [
            *COMMAND,
            "bench",
            "model.bstk",
            *SMALL,
            "--budgets",
            ",".join(sizes),
            "--csv",
            "stopped.csv",
            "--plot",
            "stopped.png",
        ],
        cwd=home,
        env=ENVIRONMENT(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (children := _children(process.pid)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75 and out == ""
    assert (
        err.strip().splitlines()[-1] == "Interrupted. Give the same command again to continue."
        and "Traceback" not in err
    )
    assert children and not any(os.path.exists(f"/proc/{child}") for child in children)
    assert not (home / "stopped.csv").exists() and not (home / "stopped.png").exists()


def test_a_stopped_run_goes_on(home, sizes, tiny_llama, monkeypatch, tmp_path):
    """What was measured before is not measured again, and a run that is through leaves nothing behind."""
    from contextlib import contextmanager

    import bstack.bench.run as module
    from bstack.bench.options import Options

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def ask(request, progress):
        if len(asked) == 2:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(request.cut.budget)
        return in_process.measure(request, progress)

    @contextmanager
    def progress(stage, steps):
        yield lambda: None

    monkeypatch.setattr(module, "ask", ask)
    budgets = [bstk.budget_bytes(size) for size in sizes]
    options = Options(budgets=budgets, speed=False, windows=2, sequence_length=24, original=str(tiny_llama))
    with pytest.raises(KeyboardInterrupt):
        module.run_bench(home / "model.bstk", options, progress)
    (kept,) = (tmp_path / "bstack" / "bench").iterdir()
    before = json.loads(kept.read_text())
    report, resume = module.run_bench(home / "model.bstk", options, progress)
    assert asked == budgets[2:] and kept.exists()
    resume.delete()
    assert not kept.exists()
    assert [vars(p.measured.quality)["kld"] for p in report.points[:2]] == [
        tuple(r["quality"]["kld"]) for r in before.values()
    ]
    assert report.notes == ["Results taken from a run of this command that was stopped: 2."]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_results_survive_a_report_that_cannot_be_written(home, sizes, tmp_path, monkeypatch):
    """A full disk or a closed pipe at the end must not cost the hours of measuring before, which processes of their own do."""
    command = ["bench", "model.bstk", "--budgets", sizes[0], "--no-quality", "--json"]
    environment = {**ENVIRONMENT(home), "XDG_CACHE_HOME": str(tmp_path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, cwd=home, env=environment
        )
    assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr
    (kept,) = (tmp_path / "bstack" / "bench").iterdir()
    monkeypatch.setattr("bstack.bench.run.ask", lambda *_: pytest.fail("measured again"))
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reading, writing = os.pipe()
    os.close(reading)
    with (
        contextlib.suppress(BrokenPipeError),  # of the closing, which writes what is left
        open(writing, "w") as closed,
        contextlib.redirect_stdout(closed),
        pytest.raises(SystemExit) as caught,
    ):
        main.main(command)
    assert caught.value.code == 1 and kept.exists()
    done = in_process.bstack(*command, cwd=home)
    assert done.returncode == 0 and not kept.exists()
    report = json.loads(done.stdout)
    assert report["notes"][-1].endswith("was stopped: 2.")  # the size and the float32 weights
    (point,), (dense,) = report["points"], report["dense"]
    assert point["load_seconds"] > 0 and point["start_memory_bytes"] > 2**20
    for measured in (point, dense):
        assert 0 <= measured["held_memory_bytes"] <= measured["peak_memory_bytes"]
        assert measured["speed"]["prompt"]["value"] > 0 and measured["speed"]["decode"]["value"] > 0


def test_python_files_of_the_current_folder_do_not_run(home, sizes, tiny_llama, tmp_path, everything):
    """In a process that measures all: neither by the child's own import path nor by an entry of PYTHONPATH that means the current folder."""
    shutil.copy(home / "model.bstk", tmp_path)
    for name in ("json", "torch", "numpy", "transformers", "bstack"):
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w')\nraise SystemExit('a stranger runs')\n")
    from bstack.bench.options import Options
    from bstack.bench.run import run_bench
    from bstack.progress import no_progress

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patch.setenv("PYTHONPATH", os.pathsep.join(["", ".", *filter(None, [os.environ.get("PYTHONPATH")])]))
        quick = {"speed": False, "windows": 3, "sequence_length": 40}
        options = Options(budgets=[bstk.budget_bytes(sizes[0])], original=str(tiny_llama), **quick)
        report, _ = run_bench("model.bstk", options, no_progress)
    measured = report.points[0].measured
    assert measured.running.load_seconds > 0
    assert measured.quality.kld.value == pytest.approx(everything["points"][0]["kld"]["value"], rel=1e-4)
    assert not list(tmp_path.glob("ran-*"))


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as stream:
            return stream.read().split()
    except OSError:
        pytest.skip("the system does not tell a process's children")
