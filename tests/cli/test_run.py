"""bstack run: text on stdout, everything else on stderr, and clear ends."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig

import in_process
import pytest
import tiny_models
from hub_server import HubServer

import bstack as library
import bstk
from bstk.http import HEAD

pytestmark = pytest.mark.slow

SETTINGS = library.Settings(codec="trellis", planes=3, samples=4, sequence_length=32)


@pytest.fixture
def bstack(tmp_path):
    """Run the command in this process."""
    return functools.partial(in_process.bstack, cwd=tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    source = tiny_models.add_tokenizer(tiny_models.save("llama", folder / "model", max_position_embeddings=4096))
    library.compress(source, folder / "model.bstk", settings=SETTINGS)
    return folder / "model.bstk"


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    library.compress(tiny_models.save("llama", folder / "model"), folder / "model.bstk", settings=SETTINGS)
    return folder / "model.bstk"


def mb(path, fraction):
    with bstk.open(path) as file:
        return (file.base.budget + fraction * (file.length - file.base.budget) + 1) / bstk.MB


def test_text_and_summary(bstack, model):
    done = bstack("run", model, "-p", "the river", "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.endswith("\n")
    assert "Using" in done.stderr and "tokens/s" in done.stderr and "bits per weight" in done.stderr
    again = bstack("run", model, "-p", "the river", "--max-new-tokens", 12, "--mb", 100, "-q")
    assert again.stdout == done.stdout and again.stderr == ""


def test_a_model_on_the_hub(bstack, model, tmp_path):
    """What fits is said first: its size, its divergence between those of the measured sizes, what is left to fetch."""
    (tmp_path / "repository").mkdir()
    shutil.copy(model, tmp_path / "repository")
    run = ("run", "hf://owner/name", "-p", "the river", "--max-new-tokens", 3)
    with bstk.open(model) as file, HubServer(tmp_path / "repository") as hub:
        sizes = [point["file_bytes"] for point in file.metadata["quality"]]
        klds = [point["kld"] for point in file.metadata["quality"]]
        budget = (sizes[2] + sizes[3]) / 2 / bstk.MB
        environment = {"HF_ENDPOINT": hub.base, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = bstack(*run, "--mb", budget, **environment)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stderr.splitlines() if line.startswith("hf://owner/name/model.bstk: "))
        assert f" of {file.length:,} bytes, " in line and "tokens/s" in line and "Fetching" in line
        kld = float(re.search(r"KLD about ([\d.e-]+)", line)[1])
        assert 0.99 * min(klds[2:4]) < kld < 1.01 * max(klds[2:4])
        # More of it is fetched later, and nothing twice.
        done = bstack(*run, **environment)
        assert f"model.bstk: all {file.length:,} bytes, KLD about" in done.stderr and "Using" in done.stderr
        runs = 3
        while "Nothing is left to fetch" not in bstack(*run, "--mb", budget, **environment).stderr:
            runs += 1  # a short answer may end before the rest is there; the next run fetches on
            assert runs < 20
        assert hub.sent <= 2 * runs * HEAD + file.length
        assert bstack(*run, "--mb", mb(model, 0) / 2, **environment).returncode == 6


def test_it_is_the_text_of_the_model(bstack, model):
    loaded, tokenizer = library.load(model, mode="packed", mb=mb(model, 0.5))
    ids = tokenizer("the river", return_tensors="pt")
    text = loaded.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    done = bstack("run", model, "-p", "the river", "--max-new-tokens", 12, "--mb", mb(model, 0.5), "--json", "-q")
    assert json.loads(done.stdout)["text"] == tokenizer.decode(text, skip_special_tokens=True)


def test_each_engine_can_be_asked_for(bstack, model):
    """And both write the same text."""
    run = ("run", model, "-p", "the river", "--max-new-tokens", 12, "--mb", 100)
    native, transformers = (bstack(*run, "--engine", name) for name in ("native", "transformers"))
    assert native.returncode == transformers.returncode == 0
    assert native.stdout == transformers.stdout and "native" in native.stderr and "native" not in transformers.stderr
    assert json.loads(bstack(*run, "--json").stdout)["engine"] == "native"


def test_a_model_that_the_native_engine_does_not_know(bstack, tmp_path):
    source = tiny_models.add_tokenizer(tiny_models.save("gpt2", tmp_path / "model"))
    library.compress(source, tmp_path / "model.bstk", settings=SETTINGS)
    run = ("run", tmp_path / "model.bstk", "-p", "the river", "--max-new-tokens", 3)
    done = bstack(*run)
    assert done.returncode == 0 and "The transformers engine runs it: its architecture is 'gpt2'." in done.stderr
    done = bstack(*run, "--engine", "native")
    assert done.returncode == 1 and "architecture is 'gpt2'" in done.stderr and "--engine transformers" in done.stderr


def test_the_native_engine_loads_neither_torch_nor_transformers(model):
    """Nor does importing the package and its functions for size."""
    code = (
        "import sys; import bstack; from bstack.engine.native.load import load; from bstack.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers'}))"
    )
    run = [sys.executable, "-c", code, "run", model, "-p", "x", "--max-new-tokens", "2", "--mb", "auto"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_json(bstack, model):
    done = bstack("run", model, "-p", "the river", "--max-new-tokens", 5, "--mb", mb(model, 0), "--json")
    result = json.loads(done.stdout)
    assert result["schema"] == "bstack.run/1" and result["new_tokens"] <= 5 and not result["interrupted"]
    with bstk.open(model) as file:
        assert result["weight_bytes"] == file.base.memory_bytes


def test_drawing(bstack, model):
    def draw(*options):
        return bstack("run", model, "-p", "the river", "--max-new-tokens", 20, "-q", *options).stdout

    assert draw("--temperature", 2, "--seed", 1) == draw("--do-sample", "--temperature", 2, "--seed", 1)
    assert draw("--temperature", 2, "--seed", 1) != draw("--temperature", 2, "--seed", 2)
    assert draw("--top-k", 1, "--seed", 1) == draw()
    assert draw("--temperature", 0, "--top-k", 50, "--do-sample", "--seed", 1) == draw()


def test_a_prompt_from_standard_input_as_installed(bstack, model):
    command = shutil.which("bstack", path=sysconfig.get_path("scripts"))
    done = subprocess.run(
        [command, "run", model, "-p", "-", "--max-new-tokens", "5", "-q"],
        input="the river",
        capture_output=True,
        text=True,
        timeout=300,
    )
    same = bstack("run", model, "-p", "the river", "--max-new-tokens", 5, "-q")
    assert done.returncode == 0 and done.stdout == same.stdout and done.stdout.strip()


def test_following_the_machine(bstack, model):
    done = bstack("run", model, "-p", "the river", "--mb", "auto", "--max-new-tokens", 5)
    assert done.returncode == 0 and "are free" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--mb", "0"], 2, "0"),
        (["--mb", "-5"], 2, "-5"),
        (["--mb", "abc"], 2, "abc"),
        (["--mb", "0.001"], 6, "smallest"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--temperature", "nan"], 2, "finite"),
        (["--mb", "most"], 2, "auto"),
        (["--top-p", "1.5"], 2, "top-p"),
        (["--max-new-tokens", "0"], 2, "max-new-tokens"),
        (["--chat"], 2, "no chat template"),
    ],
)
def test_mistakes(bstack, model, options, code, words):
    done = bstack("run", model, "-p", "the river", *options)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_prompt_that_is_no_text(bstack, model):
    done = bstack("run", model, "-p", "the river \udcff")
    assert done.returncode == 2 and "UTF-8" in done.stderr


def test_no_prompt(bstack, model):
    assert bstack("run", model).returncode == 2
    done = bstack("run", model, "-p", "")
    assert done.returncode == 2 and "empty" in done.stderr


def test_a_prompt_that_is_too_long(bstack, model):
    done = bstack("run", model, "-p", "the river " * 5000)
    assert done.returncode == 2 and "at most 4096" in done.stderr


def test_a_partial_file(bstack, model, tmp_path):
    """One line of warning, however much is asked for; none if it is not wanted; refused where the whole is asked for."""
    part = tmp_path / "part.bstk"
    part.write_bytes(model.read_bytes()[:-10])
    run = ("run", part, "-p", "the river", "--max-new-tokens", 3)
    for options in ([], ["--mb", mb(model, 0.5)]):
        done = bstack(*run, *options)
        assert done.returncode == 0 and done.stderr.startswith(f"Warning: {part}: the file is partial")
        assert done.stderr.count("the file is partial") == 1 and ".py" not in done.stderr
    assert bstack(*run, "-q").stderr == ""
    assert bstack(*run, "--strict").returncode == 3


def test_no_tokenizer(bstack, without_tokenizer):
    done = bstack("run", without_tokenizer, "-p", "x")
    assert done.returncode == 2 and "no tokenizer" in done.stderr


def test_no_such_file(bstack, tmp_path):
    done = bstack("run", tmp_path / "none.bstk", "-p", "x")
    assert done.returncode == 2 and "none.bstk" in done.stderr and "Traceback" not in done.stderr


def test_no_model(bstack, vector):
    """Golden weights that belong to no architecture."""
    done = bstack("run", vector("weights.bstk"), "-p", "x")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "bug" not in done.stderr


def test_control_characters_do_not_reach_the_terminal(monkeypatch, capsys):
    from bstack.cli._model import write

    write("a\x1b[2Jb\tc\n\u200dé")
    assert capsys.readouterr().out == "a\\x1b[2Jb\tc\n\u200dé"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted(model):
    """Ctrl-C ends the text, which stays, with the summary and exit code 75."""
    command = shutil.which("bstack", path=sysconfig.get_path("scripts"))
    process = subprocess.Popen(
        [command, "run", model, "-p", "the river", "--max-new-tokens", "4000", "--temperature", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first = process.stdout.read(1)  # the native engine writes the whole text in a tenth of a second
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert first and process.returncode in (0, 75), errors.decode()
    assert b"Traceback" not in errors
    if process.returncode == 75:
        assert b"tokens, first" in errors and b"Interrupted: the text ends here" in errors


@pytest.mark.parametrize("name", ["smollm2", "folder"])
def test_a_model_is_not_a_file_yet(bstack, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    for command in (["run", name, "-p", "x"], ["inspect", name]):
        done = bstack(*command)
        assert done.returncode == 2 and f"Compress it first: bstack compress {name} -o {name}.bstk" in done.stderr
