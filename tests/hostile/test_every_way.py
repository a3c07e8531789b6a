"""The named bad files, by every way of opening a file: the same class of error each time, in words, and nothing is changed."""

import bad_files
import pytest

import bstack
import bstk
from bstack.cli import main

pytestmark = pytest.mark.slow


class LeastSource:
    """No more than a source must have."""

    def __init__(self, data):
        self.name, self.length, self._data = "least", len(data), data

    def read(self, offset, length):
        return self._data[offset : offset + length]

    def close(self):
        pass


OPENINGS = {
    "path": lambda path, serve: bstk.open(path),
    "strict": lambda path, serve: bstk.open(str(path), strict=True),
    "bytes": lambda path, serve: bstk.open(path.read_bytes()),
    "memoryview": lambda path, serve: bstk.open(memoryview(path.read_bytes())),
    "source": lambda path, serve: bstk.open(LeastSource(path.read_bytes())),
    "url": lambda path, serve: bstk.open(serve(path.read_bytes()).url),
    "url without ranges": lambda path, serve: bstk.open(serve(path.read_bytes(), ranges=False).url),
    "truncate": lambda path, serve: bstk.truncate(path, path.with_name("out"), mb=1),
    "truncate in place": lambda path, serve: bstk.truncate(path, None, mb=1),
    "grow": lambda path, serve: bstk.grow(path, 1, path.with_name("good")),
    "grow from it": lambda path, serve: bstk.grow(path.with_name("good"), 1, path),
    "load": lambda path, serve: bstack.load(path),
    "load as a stack": lambda path, serve: bstack.load(str(path), mode="stack", strict=True),
}
COMMANDS = {
    "inspect": ["{bad}"],
    "inspect --json": ["{bad}", "--json"],
    "inspect --root": ["{bad}", "--root"],
    "verify": ["{bad}", "--strict"],
    "truncate": ["{bad}", "--mb", "1", "-o", "out"],
    "truncate --dry-run": ["{bad}", "--mb", "1", "--dry-run"],
    "grow": ["{bad}", "--mb", "1", "--from", "good"],
    "run": ["{bad}", "-p", "x", "--mb", "1"],
    "grow --from": ["good", "--mb", "1", "--from", "{bad}"],
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path, good, monkeypatch):
    (tmp_path / "good").write_bytes(good)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command in this process -> (code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main.main(list(arguments))
        return (caught.value.code, *capsys.readouterr())

    return call


# This one takes a second to read, in each way. It is a limit of the same kind as others, and tests/format reads it.
QUICK = [case for case in bad_files.OPEN if case != "metadata-262145-values"]


@pytest.mark.parametrize("case", QUICK)
def test_bad_file(case, folder, good, serve, run):
    change, expected = bad_files.OPEN[case]
    (folder / "bad").write_bytes(bad_files.build(change, good))
    before = contents(folder)
    for way, opening in OPENINGS.items():
        with pytest.raises(bstk.BstkError) as caught:
            opening(folder / "bad", serve)
        assert type(caught.value).__name__ == expected, way
        assert contents(folder) == before, way
    for command, arguments in COMMANDS.items():
        code, out, err = run(command.partition(" ")[0], *(argument.format(bad="bad") for argument in arguments))
        assert (code, out) == (caught.value.exit_code, ""), (command, err)
        assert err.startswith("Error: bad: ") and err.count("\n") == 1 and err[:-1].isprintable(), command
        assert contents(folder) == before, command


@pytest.mark.parametrize("case", bad_files.CHUNK)
def test_bad_chunk(case, folder, good, serve, run):
    number, change = bad_files.CHUNK[case]
    data = bad_files.build(change, good)
    (folder / "bad").write_bytes(data)
    before = contents(folder)
    for what in (folder / "bad", data, serve(data).url, serve(data, ranges=False).url):
        with bstk.open(what, strict=True) as reader, pytest.raises(bstk.DamagedError) as caught:
            reader.verify()
        assert caught.value.chunk == reader.chunks[number]
    code, out, err = run("verify", "bad")
    assert code == 5 and reader.chunks[number].name in err and out == ""
    assert run("inspect", "bad")[0] == 0
    with pytest.raises(bstk.BstkError):
        bstack.load(folder / "bad")
    assert contents(folder) == before
    # A cut copies frames as they are. It checks their digests, which are wrong here in one case.
    code, out, err = run("truncate", "bad", "--mb", repr((len(data) - 1) / bstk.MB), "-o", "out")
    assert code == (5 if case == "chunk-digest" else 0), err
    assert (folder / "out").exists() == (code == 0)
