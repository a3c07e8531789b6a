"""The base installation, without torch, transformers and safetensors: what runs, and what says which extra it needs."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
import tiny_models

import bstack
import bstk
from bstack.errors import COMPRESS

NEEDS = "needs the package torch: pip install 'bstack[compress]'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of an architecture that the native engine knows, and of one that it does not."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("llama", "gpt2"):
        source = tiny_models.add_tokenizer(tiny_models.save(name, folder / name))
        (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
        settings = bstack.Settings(codec="sign", planes=2, samples=2, sequence_length=16)
        bstack.compress(source, folder / f"{name}.bstk", settings=settings)
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """Start Python where nothing of the extra `compress` can be imported: ``start("-m", "bstack", ...)`` -> Popen."""
    missing = folder / "missing"
    missing.mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({(*COMPRESS, 'huggingface_hub')!r}))\n"
    (missing / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(missing), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*arguments):
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return run


@pytest.fixture
def command(start):
    def run(*arguments, text=""):
        process = start("-m", "bstack", *arguments)
        out, err = process.communicate(text, timeout=300)
        return process.returncode, out, err

    return run


def test_a_model_is_read_cut_and_run(command, folder):
    assert "LlamaForCausalLM" in command("inspect", "llama.bstk")[1]
    with bstk.open(folder / "llama.bstk") as file:
        mb = f"{(file.base.budget + file.length) / 2 / bstk.MB:.6f}"
    assert command("truncate", "llama.bstk", "--mb", mb, "-o", "small.bstk")[0] == 0
    assert command("grow", "small.bstk", "--mb", "1", "--from", "llama.bstk")[0] == 0
    assert "good" in command("verify", "small.bstk")[1]
    code, out, err = command("run", "llama.bstk", "-p", "the river", "--chat", "--temperature", "0.7")
    assert code == 0 and out.strip() and "The native engine runs it." in err
    assert json.loads(command("run", "llama.bstk", "-p", "the river", "--json")[1])["engine"] == "native"
    code, out, err = command("chat", "llama.bstk", "--max-new-tokens", "8", text="the river\n/mb 1\nthe house\n")
    assert code == 0 and len(out.splitlines()) >= 2 and "Error" not in err


def test_a_model_is_served(start):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    server = start("-m", "bstack", "serve", "llama.bstk", "--port", "0")
    try:
        address = next(found[0] for line in server.stderr if (found := re.findall(r"http://[\d.:]+", line)))
        body = json.dumps({"messages": [{"role": "user", "content": "the river"}], "max_tokens": 3}).encode()
        with urllib.request.urlopen(f"{address}/v1/chat/completions", body, timeout=300) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        server.send_signal(signal.SIGINT)
        assert server.communicate(timeout=300) and server.returncode == 0
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "llama", "-o", "out.bstk"], f"Compressing {NEEDS}"),
        (["bench", "llama.bstk"], f"Measuring {NEEDS}"),
        (["export", "llama.bstk", "out"], f"Exporting {NEEDS}"),
        (["export", "llama.bstk", "out", "--to", "transformers"], f"Exporting {NEEDS}"),
        (["export", "llama.bstk", "out.gguf", "--to", "gguf"], f"Exporting {NEEDS}"),
        (["push", "llama.bstk", "a/b"], "Publishing needs the package huggingface_hub: pip install 'bstack[hub]'"),
        (["run", "llama.bstk", "-p", "a", "--engine", "transformers"], f"The transformers engine {NEEDS}"),
        (["run", "llama.bstk", "-p", "a", "--trust-remote-code"], f"The transformers engine {NEEDS}"),
        (["run", "gpt2.bstk", "-p", "a"], f"and the transformers engine {NEEDS}"),
    ],
)
def test_what_needs_more_says_so(command, folder, arguments, words):
    before = sorted(folder.iterdir())
    code, out, err = command(*arguments)
    assert (code, out) == (1, "") and words in err and len(err.splitlines()) <= 2
    assert "Traceback" not in err and sorted(folder.iterdir()) == before


def test_the_library_says_so_too(start):
    code = (
        "import bstack, bstk\n"
        "for call in (lambda: bstack.load, lambda: bstack.compress('llama', 'out.bstk')):\n"
        "    try: call()\n"
        "    except bstk.BstkError as error: print(error)\n"
        "bstack.resize, bstack.resident, bstack.following, bstack.Settings\n"
    )
    process = start("-c", code)
    out, err = process.communicate(timeout=300)
    assert (err, out.splitlines()) == ("", [f"bstack.load {NEEDS}", f"Compressing {NEEDS}"])
