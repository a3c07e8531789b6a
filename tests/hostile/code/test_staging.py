"""What is copied beside the weights of a model with code of its own, and what stays of it."""

import gc
import shutil

import pytest

from bstack.errors import ForeignCodeWarning
from bstack.models.code import stage_model
from bstack.models.open import open_checkpoint


def test_opening_often_leaves_no_more_than_once(model, tmp_path, marker, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    left = []
    for _ in range(3):
        with pytest.warns(ForeignCodeWarning):
            open_checkpoint(model, trust_remote_code=True)
        gc.collect()
        left.append(sorted(path for path in (tmp_path / "modules").rglob("*") if "__pycache__" not in path.parts))
    assert left[0] == left[1] == left[2] != []
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_read_is_copied_and_nothing_else(model, tmp_path, marker):
    read = ["additional_chat_templates/tools.jinja", "qwen.tiktoken"]
    for name in [*read, "onnx/model.onnx_data", "onnx/config.json", "weights.npz", "data/train.txt", "notes.pdf"]:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x")
    own = [path.name for path in model.iterdir() if path.suffix in (".json", ".jinja")]
    with pytest.warns(ForeignCodeWarning):
        code = open_checkpoint(model, trust_remote_code=True).code
    folder = stage_model(model, code)
    copied = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder.parent)
    assert copied == {*read, *own, *code.digests}
