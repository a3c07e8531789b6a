"""``bstack compress`` in this process, a model to damage, and what a refusal is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compressing import QUICK, everything

from bstack.cli import main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run ``bstack compress ARGUMENTS`` in this process, which has torch already, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main.main(["compress", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "unexpected" not in err and "bug in bstack" not in err, err
        return caught.value.code, out, err

    return call


@pytest.fixture
def model(tiny_llama, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def refused(run, tmp_path):
    """A failure: its words on stderr, nothing on stdout, and nothing left that was not there before."""

    def call(code, words, *arguments):
        before = everything(tmp_path)
        found, out, err = run("-o", "out.bstk", *QUICK, *arguments)
        assert (found, out) == (code, ""), err
        for word in [words] if isinstance(words, str) else words:
            assert word in err
        assert everything(tmp_path) == before

    return call
