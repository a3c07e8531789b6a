"""The command as a whole: help, versions, exit codes, what is imported, how failures end."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from bstack.cli import _group, main
from bstk import errors

DOCS = Path(__file__).parents[2] / "docs"


def all_commands():
    context = click.Context(main)
    return [(name, main.get_command(context, name)) for name in main.list_commands(context)]


@pytest.mark.parametrize(("name", "command"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_help_with_an_example(name, command):
    text = command.get_help(click.Context(command, info_name=name))
    assert "Example:" in text and f"bstack {name}" in text
    # The first words stand in `bstack --help` too.
    assert all(option.help for option in command.params if isinstance(option, click.Option) and not option.hidden)


def test_help_and_short_help(bstack):
    long, short = bstack("--help"), bstack("-h")
    assert long.returncode == 0 and long.stdout == short.stdout and not long.stderr
    for name, _ in all_commands():
        assert re.search(rf"^  {name} ", long.stdout, re.MULTILINE)
        assert bstack(name, "-h").returncode == 0


def test_version(bstack):
    done = bstack("--version")
    assert done.returncode == 0
    assert re.match(
        r"bstack \d+\.\d+\.\d+ \(reads and writes format 1\.2, Python 3[\d.]+\S*, kernels: \w+\)\n", done.stdout
    )
    assert "torch" in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["inspect", "-h"],
        ["inspect"],
        ["verify"],
        ["truncate", "--mb", "0.0018", "--dry-run"],
    ],
)
def test_imports_no_torch(args, vector):
    path = [] if args[-1].startswith(("--h", "-h", "--v")) else [str(vector("whole.bstk"))]
    code = (
        "import sys; from bstack.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args, *path], capture_output=True, text=True, check=True)
    # The self-test of the kernels, which --version reports, and their speed, which inspect estimates, need numpy.
    assert done.stderr == ("numpy\n" if args in (["--version"], ["inspect"]) else "\n")


def test_interrupted_while_the_commands_are_imported():
    code = (
        "import sys, bstack.__main__\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "bstack.__main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "Interrupted.\n")


def test_documented_exit_codes_are_those_of_the_classes():
    documented, of_attributes = {}, {}
    for code, names in re.findall(r"^\| (\d+) \| (.*?) \|", (DOCS / "guide.md").read_text(), re.MULTILINE):
        for name, attribute in re.findall(r"`(\w+)`(?: \(`(\w+)`\))?", names):
            if attribute:
                of_attributes[name, attribute] = int(code)
            else:
                documented[name] = int(code)
    classes = {
        name: cls.exit_code
        for module in (errors, pytest.importorskip("bstack.errors"))
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if hasattr(cls, "exit_code")
    }
    assert documented == classes
    attributes = ("missing", "resumable")
    assert of_attributes == {("RemoteError", a): errors.RemoteError(**{a: True}).exit_code for a in attributes}


@pytest.fixture
def failing(monkeypatch, capsys):
    """Run a command that raises `error`; return (exit code, stdout, stderr)."""

    def run(error):
        @click.command()
        def command():
            raise error

        group = _group.LazyGroup("bstack", package="none", summaries={"x": "x"})
        monkeypatch.setattr(group, "get_command", lambda ctx, name: command)
        with pytest.raises(SystemExit) as caught:
            group.main(["x"])
        return (caught.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.DamagedError("it is broken."), 5, "Error: it is broken."),
        (errors.PartialError("half."), 3, "Error: half."),
        (errors.Interrupted("stopped."), 75, "Error: stopped."),
        (KeyboardInterrupt(), 75, "Interrupted. Give the same command again"),
        (MemoryError(), 7, "Error: not enough memory."),
        (RuntimeError("DefaultCPUAllocator: Error code 12 (Cannot allocate memory)"), 7, "Error: not enough memory."),
        (OSError(28, "No space left on device", "x.bstk"), 7, "Error: x.bstk: No space left on device."),
        (OSError(13, "Permission denied", "x.bstk"), 1, "Error: x.bstk: Permission denied."),
        (click.UsageError("wrong."), 2, "Error: wrong."),
        (RuntimeError("oops"), 1, "unexpected RuntimeError: oops. This is a bug in bstack; set BSTACK_DEBUG=1"),
        (errors.UsageError("a name with \x1b[31m in it"), 2, "\\x1b[31m in it"),
    ],
)
def test_failures_end_in_words_and_a_code(failing, error, code, words):
    found, out, err = failing(error)
    assert (found, out) == (code, "")
    assert words in err and "Traceback" not in err and "\x1b" not in err


def test_debug_shows_the_traceback(failing, monkeypatch):
    monkeypatch.setenv("BSTACK_DEBUG", "1")
    code, _, err = failing(RuntimeError("oops"))
    assert code == 1 and "Traceback" in err


def test_unknown_command_and_option(bstack):
    for args in ("compres", "inspect --nope x", "verify none.bstk", "verify", "truncate none.bstk --mb 3"):
        done = bstack(*args.split())
        assert (done.returncode, done.stdout) == (2, ""), args
        assert "Error:" in done.stderr and "Traceback" not in done.stderr


def test_closed_pipe_is_no_traceback(vector):
    code = f"{sys.executable} -m bstack inspect --blocks {vector('whole.bstk')} | true"
    done = subprocess.run(["sh", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_broken_pipe_inside_a_command_is_reported():
    """Only a closed standard output ends a command in silence: a child or a server may close a pipe, too."""
    code = (
        "import click\n"
        "from bstack.cli import _group\n"
        "@click.command()\n"
        "def command():\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "group = _group.LazyGroup('bstack', package='none', summaries={'x': 'x'})\n"
        "group.get_command = lambda ctx, name: command\n"
        "group.main(['x'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    words = "a pipe or connection was closed at its other end"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {words}: [Errno 32] Broken pipe.\n")


def test_the_option_of_an_error_becomes_a_flag(failing):
    error = errors.UsageError("x.bstk exists.")
    error.option = "overwrite"
    assert failing(error) == (2, "", "Error: x.bstk exists. Use --force to replace it.\n")


def test_shell_completion(bstack):
    done = bstack(_BSTACK_COMPLETE="bash_complete", COMP_WORDS="bstack tr", COMP_CWORD="1")
    assert done.stdout == "plain,truncate\n"
