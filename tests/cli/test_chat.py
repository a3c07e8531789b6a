"""bstack chat: a conversation in the terminal."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import in_process
import pytest
import tiny_models

import bstack as library
import bstk

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[bot] {% endif %}"
)


def made(folder, kind="llama", template=TEMPLATE):
    source = tiny_models.add_tokenizer(tiny_models.save(kind, folder / "model", max_position_embeddings=256))
    if template:
        (source / "chat_template.jinja").write_text(template)
    settings = library.Settings(codec="trellis", planes=3, samples=4, sequence_length=32)
    library.compress(source, folder / "model.bstk", settings=settings)
    return folder / "model.bstk"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made(tmp_path_factory.mktemp("chat"))


def talk(path, text, *options):
    command = [sys.executable, "-m", "bstack", "chat", path, "--max-new-tokens", "8", *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)


def tokens(done):
    """Tokens of the prompts, in turn."""
    return [int(line.split(" + ")[0]) for line in done.stderr.splitlines() if " tokens, first" in line]


def test_a_conversation(model):
    done = talk(model, "the river\nthe house\n/reset\nthe river\n\n")
    assert done.returncode == 0, done.stderr
    first, second, again = tokens(done)
    assert first == again < second
    lines = done.stdout.splitlines()
    assert lines and done.stdout.startswith(lines[0]) and done.stdout.endswith(f"{lines[0]}\n")
    with_system = tokens(talk(model, "the river\n/system the old town\nthe river\n", "--system", "the town"))
    assert first < with_system[0] < with_system[1]


def test_instructions_are_shown_and_stay(model):
    done = talk(model, "/system\nthe river\n/system\nthe house\n/exit\nnever read\n", "--system", "the town")
    assert done.stderr.splitlines().count("the town") == 2
    first, second = tokens(done)
    assert first < second
    assert "There are no instructions." in talk(model, "/system\n").stderr


def test_commands_and_mistakes(model):
    with bstk.open(model) as file:
        small, full = (file.base.budget + 1) / bstk.MB, file.length / bstk.MB
    long = "the river " * 200
    done = talk(
        model, f"/mb {small}\n/mb {full}\n/mb 0.001\n/mb x\n/nothing\n/help\n/mb auto\n/mb\n{long}\nthe river\n"
    )
    assert done.returncode == 0, done.stderr
    sizes = [line for line in done.stderr.splitlines() if "of weights, " in line]
    assert len(sizes) == 4 and sizes[0] != sizes[1] and sizes[2].endswith("following the machine")
    for words in (
        "smallest budget",
        "'x'",
        "/nothing is no command",
        "/system TEXT",
        "at most 256. The message is left out",
        "left out",
    ):
        assert words in done.stderr, words
    assert len(tokens(done)) == 1


def test_a_model_without_a_template(tmp_path):
    path = made(tmp_path, template=None)
    done = talk(path, "the river\n")
    assert done.returncode == 2 and "has no chat template. bstack run -p" in done.stderr


def test_a_model_of_the_other_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the river\nthe house\n"))
    done = in_process.bstack("chat", made(tmp_path, "gpt2"), "--max-new-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "transformers engine" in done.stderr and len(tokens(done)) == 2


def test_a_terminal(model):
    """Through run without a prompt: Ctrl-C stops an answer or drops a line, Ctrl-D ends."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "bstack", "run", model, "--mb", "100"]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=own)
    os.close(other)
    seen = ""

    def until(words, start=0, again=b""):
        """Read until the words; what is typed again reaches a line that was not waiting for it yet."""
        nonlocal seen
        end = time.monotonic() + 300
        while not (found := re.compile(words).search(seen, start)):
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 4096).decode(errors="replace")
            else:
                os.write(main, again)
        return found.end()

    try:
        at = until("> ")
        os.write(main, b"the river\n")
        at = until("the river\r\n.", at)
        os.write(main, b"\x03")
        at = until("tokens, first|left out", at)  # the tiny model may be faster
        at = until("> ", at)
        os.write(main, b"half a line")
        at = until("half a line", at)  # Ctrl-C drops what was not read yet
        os.write(main, b"\x03")
        at = until("> ", at, again=b"\x03")
        os.write(main, b"/mb\n")
        at = until("of weights", at)
        until("> ", at)
        os.write(main, b"\x04")
        assert process.wait(300) == 0
    finally:
        process.kill()
        os.close(main)


def own():
    """Make the terminal that of the process, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_run_without_a_prompt_and_without_a_terminal(model):
    done = subprocess.run(
        [sys.executable, "-m", "bstack", "run", model], input="", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "there is no prompt" in done.stderr
