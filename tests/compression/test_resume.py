"""An interrupted compression: the same command goes on where it was and gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import tiny_models
from compressing import rewrite

import bstk
from bstack.cli import main
from bstack.workdir import WorkDirectory

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"), pytest.mark.slow]

QUICK = ["--codec", "sign", "--planes", "3", "--rank", "2", "--samples", "3", "--sequence-length", "16", "-q"]
LAYERS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save("llama-tied", tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=LAYERS)


def compress(*arguments) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main.main(["compress", *map(str, arguments)])
    return caught.value.code


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "another name.bstk"
    assert compress(model, "-o", output, *QUICK) == 0
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    return output.read_bytes()


def test_the_same_command_gives_the_same_bytes(model, uninterrupted, tmp_path):
    assert compress(model, "-o", tmp_path / "out.bstk", *QUICK) == 0
    assert (tmp_path / "out.bstk").read_bytes() == uninterrupted
    assert compress(model, "-o", tmp_path / "seed.bstk", *QUICK, "--seed", 1) == 0
    assert (tmp_path / "seed.bstk").read_bytes() != uninterrupted


# Every moment: a process that imports everything once, and for each moment has a child that strikes itself down exactly
# there, and a second one that is given the same command.
CHILDREN = '''
import json, os, signal, sys
import bstack, bstk.writer, bstack.workdir as workdir
from bstack.cli import main

model, folder, quick, moments = json.loads(sys.argv[1])

def strike(number):
    os.kill(os.getpid(), number)

def arm(when, what, number):
    """Strike before or after a file of the work directory is put in place, or at the n-th block that is packed or written."""
    if when in ("before", "after"):
        replace = os.replace
        def striking_replace(source, target, *more, **named):
            hit = os.path.basename(target) == what
            if hit and when == "before": strike(number)
            replace(source, target, *more, **named)
            if hit and when == "after": strike(number)
        os.replace = striking_replace
    else:
        owner, name = {"packing": (workdir.Part, "add"), "writing": (bstk.writer, "_check_stored")}[when]
        original, count = getattr(owner, name), [0]
        def striking(*arguments, **named):
            count[0] += 1
            if count[0] == what: strike(number)
            return original(*arguments, **named)
        setattr(owner, name, striking)

def child(prepare, arguments):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            prepare()
            main.main(["compress", *arguments])
        except SystemExit as end:
            os._exit(end.code)
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# Once in this process, so that no child has to import anything.
bstack.compress(model, os.path.join(folder, "warm.bstk"), settings=bstack.Settings(samples=1, sequence_length=8))
results = []
for index, (when, what, number) in enumerate(moments):
    own = os.path.join(folder, str(index))
    os.mkdir(own)
    output = os.path.join(own, "out.bstk")
    arguments = [model, "-o", output, *quick]
    ended = child(lambda: arm(when, what, number), arguments)
    between = sorted(os.listdir(own))
    kept = sorted(os.listdir(output + ".work")) if os.path.isdir(output + ".work") else []
    again = child(lambda: None, arguments)
    results.append([ended, between, kept, again, sorted(os.listdir(own))])
print(json.dumps(results))
'''

MOMENTS = [
    (when, what, number)
    for when, what, numbers in [
        ("after", "settings.json", "K"),
        ("before", "files.json", "K"),
        ("after", "windows.safetensors", "I"),
        ("before", "sensitivity.safetensors", "K"),
        ("after", "sensitivity.safetensors", "I"),
        ("packing", 20, "KI"),
        ("before", "layer-00001.json", "K"),
        ("after", "layer-00001.json", "I"),
        ("after", f"layer-{LAYERS - 1:05d}.json", "K"),
        ("after", "head.safetensors", "K"),
        ("after", "outside.json", "I"),
        ("writing", 1, "K"),
        ("writing", 30, "KI"),
    ]
    for number in numbers
]


@pytest.fixture(scope="module")
def struck(model, tmp_path_factory):
    """What happened at each of the moments."""
    folder = tmp_path_factory.mktemp("struck")
    moments = [(when, what, {"K": signal.SIGKILL, "I": signal.SIGINT}[number]) for when, what, number in MOMENTS]
    task = json.dumps([str(model), str(folder), QUICK, moments])
    done = subprocess.run([sys.executable, "-c", CHILDREN, task], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("index", range(len(MOMENTS)), ids=["-".join(map(str, moment)) for moment in MOMENTS])
def test_interrupted_at(index, struck, uninterrupted):
    folder, results = struck
    ended, between, kept, again, after = results[index]
    assert ended == (-signal.SIGKILL if MOMENTS[index][2] == "K" else 75)
    # The output is there whole or not at all; what else lies there is the work, and of a kill while writing a temporary.
    assert "out.bstk" not in between and "out.bstk.work" in between and "settings.json" in kept
    if MOMENTS[index][2] == "I":
        assert between == ["out.bstk.work"]
    assert again == 0
    assert (folder / str(index) / "out.bstk").read_bytes() == uninterrupted
    leftovers = [name for name in after if name != "out.bstk"]
    assert not leftovers


def test_finished_layers_are_not_done_again(model, tmp_path, monkeypatch):
    output = tmp_path / "out.bstk"
    done = []

    def counting(skeleton, index, *arguments):
        done.append(index)
        if index == 2 and len(done) == 3:
            raise KeyboardInterrupt
        return original(skeleton, index, *arguments)

    from bstack.compression import layers

    original = layers._compress_layer
    monkeypatch.setattr(layers, "_compress_layer", counting)
    assert compress(model, "-o", output, *QUICK) == 75
    assert compress(model, "-o", output, *QUICK) == 0
    assert done == [0, 1, 2, 2]


@pytest.fixture(scope="module")
def two_layers(model, tmp_path_factory):
    """The work directory of a run that was interrupted after two layers."""
    from bstack.compression import layers

    output = tmp_path_factory.mktemp("unfinished") / "out.bstk"

    def interrupt(skeleton, index, *arguments):
        if index == 2:
            raise KeyboardInterrupt
        return original(skeleton, index, *arguments)

    original = layers._compress_layer
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers, "_compress_layer", interrupt)
        assert compress(model, "-o", output, *QUICK) == 75
    return output.with_name("out.bstk.work")


@pytest.fixture
def unfinished(two_layers, tmp_path):
    """A copy of it."""
    return shutil.copytree(two_layers, tmp_path / "out.bstk.work")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--planes", "4"], "planes was 3, now 4"),
        (["--rank", "auto"], 'rank was 2, now "auto"'),
        (["--seed", "7"], "seed was 0, now 7"),
        (["--samples", "4"], "samples was 3, now 4"),
        (["--embeddings", "dense", "--seed", "7"], 'embeddings was "stack", now "dense"; seed was 0, now 7'),
    ],
)
def test_other_settings_are_refused(unfinished, model, tmp_path, capsys, options, words):
    before = sorted(p.name for p in unfinished.iterdir())
    assert compress(model, "-o", tmp_path / "out.bstk", *QUICK, *options) == 2
    err = capsys.readouterr().err
    assert words in err and "Repeat the earlier settings" in err and "--work-dir" in err
    # Nothing was lost by the attempt, and another work directory works.
    assert sorted(p.name for p in unfinished.iterdir()) == before
    assert compress(model, "-o", tmp_path / "out.bstk", *QUICK, *options, "--work-dir", tmp_path / "other") == 0
    assert not (tmp_path / "other").exists()


def test_another_model_is_refused(unfinished, tmp_path, capsys):
    other = tiny_models.save("llama-tied", tmp_path / "model", num_hidden_layers=LAYERS, seed=1)
    assert compress(other, "-o", tmp_path / "out.bstk", *QUICK) == 2
    assert "model.model.safetensors was" in capsys.readouterr().err


def test_a_model_that_was_mended_is_not_refused(tmp_path, capsys):
    """Windows of a text were kept already when the weight was read."""
    folder = tiny_models.add_tokenizer(tiny_models.save("llama", tmp_path / "model"))
    (tmp_path / "corpus.txt").write_text(tiny_models.text())
    command = [folder, "-o", tmp_path / "out.bstk", *QUICK, "--calibration", tmp_path / "corpus.txt"]
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[:1].fill_(1e6))
    assert compress(*command) == 1
    assert "holds weights up to 1e+06" in capsys.readouterr().err
    assert not (tmp_path / "out.bstk.work").exists()
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[:1].fill_(1))
    assert compress(*command) == 0


def test_a_second_process_is_kept_out(unfinished, model, tmp_path, capsys, uninterrupted):
    settings = json.loads((unfinished / "settings.json").read_text())
    first = WorkDirectory(unfinished, settings)
    assert compress(model, "-o", tmp_path / "out.bstk", *QUICK) == 2
    assert "in use by another bstack compress" in capsys.readouterr().err
    first.release()
    assert compress(model, "-o", tmp_path / "out.bstk", *QUICK) == 0
    assert (tmp_path / "out.bstk").read_bytes() == uninterrupted


def test_a_damaged_record_says_what_to_delete(unfinished, model, tmp_path, capsys):
    (unfinished / "settings.json").write_text("{")
    assert compress(model, "-o", tmp_path / "out.bstk", *QUICK) == 2
    assert f"Delete {unfinished}" in capsys.readouterr().err


def test_the_installed_command_struck_from_outside(tmp_path):
    """Ctrl-C, then kill -9, then to the end, as a person would."""
    model = tiny_models.save("llama-tied", tmp_path / "model", num_hidden_layers=7)
    installed = shutil.which("bstack", path=sysconfig.get_path("scripts"))
    command = [installed] if installed else [sys.executable, "-m", "bstack"]
    arguments = [*QUICK, "--planes", "6"]
    output, work = tmp_path / "out.bstk", tmp_path / "out.bstk.work"

    def strike(number, part):
        process = subprocess.Popen(
            [*command, "compress", model, "-o", output, *arguments], stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and not (work / part).exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        return process.communicate()[1], process.returncode

    err, code = strike(signal.SIGINT, "layer-00001.json")
    assert code == 75 and "Give the same command again" in err and "Traceback" not in err
    assert not output.exists() and (work / "layer-00001.json").exists()
    _, code = strike(signal.SIGKILL, "layer-00003.json")
    assert code == -signal.SIGKILL and not output.exists()
    assert compress(model, "-o", output, *arguments) == 0 and not work.exists()
    assert compress(model, "-o", tmp_path / "whole.bstk", *arguments) == 0
    assert output.read_bytes() == Path(tmp_path / "whole.bstk").read_bytes()
    with bstk.open(output, strict=True) as file:
        assert file.state == "whole"
