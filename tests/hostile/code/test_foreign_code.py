"""Models whose code is not in transformers: it runs only where the user says so, and never out of a .bstk."""

import json
import shutil
import warnings

import in_process
import pytest
import samples
import tiny_models
import torch
from own_code import MAP, QUICK, SETTINGS, Marker, edit, forget, logits, put_modules, rewritten
from transformers import AutoModelForCausalLM

import bstack
import bstk
from bstack.errors import ForeignCodeError, ForeignCodeWarning
from bstack.models.open import open_checkpoint

pytestmark = pytest.mark.slow


def test_refused_without_the_flag(model, tmp_path, marker, run):
    with pytest.raises(
        ForeignCodeError, match=r"configuration_own.OwnConfig, modeling_own.OwnForCausalLM.*trust_remote_code"
    ):
        bstack.compress(model, tmp_path / "own.bstk", settings=SETTINGS)
    code, out, err = run("compress", model, "-o", tmp_path / "own.bstk", *QUICK)
    assert (code, out) == (2, "") and "--trust-remote-code" in err and err.count("\n") == 1
    assert marker.taken() == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_a_tokenizer_alone_is_refused_too(tiny_llama, tmp_path, marker, run):
    folder = shutil.copytree(tiny_llama, tmp_path / "own")
    put_modules(folder, marker)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )
    code, _, err = run("compress", folder, "-o", tmp_path / "own.bstk", *QUICK)
    assert code == 2 and "tokenization_own.OwnTokenizerFast" in err and "--trust-remote-code" in err
    assert marker.taken() == set()


@pytest.mark.parametrize("trusting", [False, True])
def test_a_model_that_transformers_has_needs_no_code(tiny_llama, tmp_path, marker, trusting):
    folder = put_modules(shutil.copytree(tiny_llama, tmp_path / "own"), marker)
    edit(folder / "config.json", auto_map=MAP)
    bstack.compress(folder, tmp_path / "out.bstk", settings=SETTINGS, trust_remote_code=trusting)
    model, _ = bstack.load(tmp_path / "out.bstk", trust_remote_code=trusting)
    assert type(model).__module__.startswith("transformers.models.llama") and marker.taken() == set()


def test_a_tokenizer_alone_runs_alone(tiny_llama, tmp_path, marker):
    folder = put_modules(shutil.copytree(tiny_llama, tmp_path / "own"), marker)
    edit(folder / "config.json", auto_map=MAP)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )
    with pytest.warns(ForeignCodeWarning, match="helper.py, tokenization_own.py"):
        bstack.compress(folder, tmp_path / "out.bstk", settings=SETTINGS, trust_remote_code=True)
    assert marker.taken() == {"tokenizer"}
    forget()
    with pytest.warns(ForeignCodeWarning, match="helper.py, tokenization_own.py"):
        model, tokenizer = bstack.load(tmp_path / "out.bstk", trust_remote_code=True, code=folder)
    assert (
        type(model).__module__.startswith("transformers.models.llama")
        and type(tokenizer).__name__ == "OwnTokenizerFast"
    )
    assert marker.taken() == {"tokenizer"}


def test_the_file_holds_no_code_and_no_path(packed, tmp_path):
    with bstk.open(packed) as file:
        assert not [name for name in file.files if name.endswith(".py")]
        code = file.metadata["model"]["code"]
        assert code["from"] is None and set(code["modules"]) == {
            "configuration_own.py",
            "helper.py",
            "modeling_own.py",
            "tokenization_own.py",
        }
    assert str(tmp_path).encode() not in packed.read_bytes()


@pytest.mark.parametrize("mode", ["dense", "stack"])
def test_loads_with_the_flag_and_the_place(packed, model, marker, mode):
    with pytest.raises(ForeignCodeError, match="trust_remote_code"):
        bstack.load(packed, mode=mode)
    with pytest.raises(ForeignCodeError, match=r"compressed from a folder.*code"):
        bstack.load(packed, mode=mode, trust_remote_code=True)
    with pytest.raises(bstk.UsageError, match="trust_remote_code"):
        bstack.load(packed, mode=mode, code=model)
    assert marker.taken() == set()
    with pytest.warns(ForeignCodeWarning, match=f"from {model}: configuration_own.py"):
        loaded, tokenizer = bstack.load(packed, mode=mode, trust_remote_code=True, code=model)
    assert type(loaded).__name__ == "OwnForCausalLM" and type(tokenizer).__name__ == "OwnTokenizerFast"
    with pytest.warns(ForeignCodeWarning):
        original = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
        whole, _ = bstack.load(packed, trust_remote_code=True, code=model)
    # The code is in use: it lifts the logits, and what the planes leave out is less than that.
    assert torch.allclose(logits(loaded), logits(whole), atol=1e-3)
    assert logits(loaded).mean() > logits(original).mean() - 0.5


def test_code_inside_a_container_never_runs(packed, model, tmp_path, marker):
    """Somebody puts modules among the files of a container, and names folders and a hub id in its configuration."""
    stranger = Marker(tmp_path / "stranger")
    evil = put_modules(tmp_path / "evil", stranger)
    forget()
    with bstk.open(packed) as file:
        data = {name: file.file(name) for name in file.files}
        data |= {path.name: path.read_bytes() for path in evil.iterdir()}
        config = json.loads(data["config.json"])
        for place in ("", f"{evil}--", "owner/evil--"):
            config["auto_map"] = {auto: place + name for auto, name in MAP.items()}
            data["config.json"] = json.dumps(config).encode()
            files = [samples.entry(name, bstk.FILE, content) for name, content in data.items()]
            others = [
                samples.entry(
                    c.name,
                    c.kind,
                    file.read(c),
                    level=c.level,
                    shape=c.shape,
                    dtype=c.dtype,
                    rank=c.rank,
                    transposed=c.transposed,
                )
                for c in file.chunks
                if c.kind != bstk.FILE
            ]
            metadata = {**file.metadata, "model": {**file.metadata["model"], "code": {"from": str(evil)}}}
            bstk.write(tmp_path / "evil.bstk", metadata, files + others, file.base_count + len(list(evil.iterdir())))
            with pytest.raises(ForeignCodeError):
                bstack.load(tmp_path / "evil.bstk")
            with pytest.raises(ForeignCodeError):
                bstack.load(tmp_path / "evil.bstk", trust_remote_code=True)
            assert (marker.taken(), stranger.taken()) == (set(), set())
            with pytest.warns(ForeignCodeWarning):
                bstack.load(tmp_path / "evil.bstk", trust_remote_code=True, code=model)
            assert stranger.taken() == set() and marker.taken() == {"configuration", "model", "tokenizer"}
            forget()


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("/abs/path/evil.Class", "'/abs/path/evil.Class'. Allowed is module.Class"),
        ("../evil.Class", "Allowed is module.Class"),
        ("modeling_own", "Allowed is module.Class"),
        ("modeling_own.Own.Class", "Allowed is module.Class"),
        ("absent.Class", "its code absent.Class in .*absent.py"),
        ("latin.Class", "its code latin.Class in .* cannot be read"),
        ("deep.Class", "its code deep.Class in .*sub.mod.py"),
        ("up.Class", "its code up.Class in .* cannot be read"),
        ("lost.Class", "its code lost.Class in .*nowhere.py"),
    ],
)
def test_references_that_lead_nowhere(model, tmp_path, packed, marker, run, reference, words):
    (tmp_path / "abs").mkdir()
    (model / "latin.py").write_bytes(b"# caf\xe9\n")
    (model / "deep.py").write_text("from .sub.mod import Class\n")
    (model / "up.py").write_text("from ..own.helper import Class\n")
    (model / "lost.py").write_text("from .nowhere import Class\n")
    edit(model / "config.json", auto_map={**MAP, "AutoConfig": reference})
    with pytest.raises(ForeignCodeError, match=words):
        open_checkpoint(model, trust_remote_code=True)
    code, out, err = run("compress", model, "-o", tmp_path / "out.bstk", "--trust-remote-code", *QUICK)
    assert (code, out) == (2, "") and err.count("\n") == 1
    changed = rewritten(packed, tmp_path / "changed.bstk", {"config.json": (model / "config.json").read_bytes()})
    with pytest.raises(ForeignCodeError, match=words):
        bstack.load(changed, trust_remote_code=True, code=model)
    assert marker.taken() == set()


def test_a_folder_in_place_of_a_module(packed, model, tmp_path, marker):
    changed = rewritten(packed, tmp_path / "changed.bstk", {"helper.py/x.json": b"{}", "a.py/b.py/c.py": b"1"})
    with pytest.warns(ForeignCodeWarning):
        loaded, _ = bstack.load(changed, trust_remote_code=True, code=model)
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_commands(model, tmp_path, marker, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(tiny_models.text())
    code, _, err = run("compress", "own", "-o", "own.bstk", "--trust-remote-code", "--calibration", "text.txt", *QUICK)
    assert code == 0 and "Warning: own: running Python code from own: configuration_own.py" in err
    writing = ["run", "own.bstk", "-p", "the river", "--mb", "100", "--max-new-tokens", "3"]
    quick = ["--windows", "2", "--sequence-length", "16", "--text", "text.txt", "--budgets", "100", "--no-speed"]
    measuring = ["bench", "own.bstk", *quick]
    trusting = ["--trust-remote-code", "--code", "own"]
    marker.taken()
    for command in (writing, measuring):
        code, out, err = run(*command)
        assert (code, out) == (2, "") and "--trust-remote-code" in err
        assert run(*command, "--code", "own")[0] == 2
        assert marker.taken() == set()
        forget()
        code, out, err = run(*command, *trusting)
        assert code == 0 and "Warning: own.bstk: running Python code from own" in err, err
        assert "model" in marker.taken()
    monkeypatch.setattr("bstack.bench.run.ask", in_process.measure)  # above, processes of its own ran the code
    assert run(*measuring, "--original", "own")[0] == 2
    assert marker.taken() == set()
    assert run(*measuring, "--original", "own", "--trust-remote-code")[0] == 0


def test_a_configuration_chooses_no_kernels_of_the_hub(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    edit(folder / "config.json", attn_implementation="owner/kernel", experts_implementation="owner/kernel")
    config = open_checkpoint(folder).config
    assert config._attn_implementation is None and config._experts_implementation is None
    edit(folder / "config.json", attn_implementation="eager")
    assert open_checkpoint(folder).config._attn_implementation == "eager"


def test_no_question_is_asked(model, monkeypatch):
    """transformers asks on standard input without a setting; nothing of bstack leaves it to that."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with warnings.catch_warnings(action="error"), pytest.raises(ForeignCodeError):
        open_checkpoint(model)


def test_other_code_than_the_recorded_one_is_named(packed, model, marker):
    (model / "helper.py").write_text((model / "helper.py").read_text() + "\n# changed\n")
    with pytest.warns(ForeignCodeWarning, match="Other code than the model was compressed with: helper.py."):
        bstack.load(packed, trust_remote_code=True, code=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (model / "helper.py").write_text((model / "helper.py").read_text().removesuffix("\n# changed\n"))
        bstack.load(packed, trust_remote_code=True, code=model)
    assert [
        str(one.message) for one in caught if "running" in str(one.message) and "Other code" in str(one.message)
    ] == []
