"""Models whose code is not in transformers: it runs only where the user says so, and never out of a .bstk."""

import gc
import json
import shutil
import sys
import warnings

import bstack
import bstk
import pytest
import samples
import tiny_models
import torch
from bstack.cli import main
from bstack.errors import ForeignCodeError, ForeignCodeWarning, UnsupportedModelError
from bstack.models.hub import hub_snapshot
from bstack.models.open import open_checkpoint
from bstack.models.staging import staged
from transformers import AutoModelForCausalLM

SETTINGS = bstack.Settings(codec="sign", planes=2, rank=2, samples=2, sequence_length=16)
QUICK = ["--codec", "sign", "--planes", "2", "--rank", "2", "--samples", "2", "--sequence-length", "16"]
CONFIGURATION = """
from transformers import LlamaConfig
from .helper import mark
mark("configuration")
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper import mark
mark("model")
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = result.logits + 1
        return result
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
from .helper import mark
mark("tokenizer")
class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""
HELPER = """
def mark(what):
    with open({!r}, "a") as stream:
        stream.write(what + " ")
"""
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


class Marker:
    """What the code writes when it runs."""

    def __init__(self, path):
        self.path = path

    def taken(self):
        """What has run since the last call."""
        found = self.path.read_text().split() if self.path.exists() else []
        self.path.unlink(missing_ok=True)
        return set(found)


@pytest.fixture
def marker(tmp_path):
    return Marker(tmp_path / "marker")


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers copies code that it runs; nothing of an earlier test is in it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    forget()


def forget():
    """Have modules run again when they are imported again."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put_modules(folder, marker):
    folder.mkdir(exist_ok=True)
    (folder / "helper.py").write_text(HELPER.format(str(marker.path)))
    for name, text in (("configuration", CONFIGURATION), ("modeling", MODELING), ("tokenization", TOKENIZATION)):
        (folder / f"{name}_own.py").write_text(text)
    return folder


@pytest.fixture
def model(tiny_llama, tmp_path, marker):
    """A folder as `save_pretrained` leaves it for a model with code of its own."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_llama, folder)
    put_modules(folder, marker)
    edit(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=MAP)
    edit(
        folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )  # fmt: skip
    return folder


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as caught:
            main.main(list(map(str, arguments)))
        return (caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def packed(model, tmp_path, marker):
    """The model, compressed by a user who trusts it."""
    with pytest.warns(ForeignCodeWarning, match="configuration_own.py, helper.py, modeling_own.py, tokenization_own.py"):
        bstack.compress(model, tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    assert marker.taken() == {"configuration", "model", "tokenizer"}
    return tmp_path / "own.bstk"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def rewritten(path, target, changed):
    """A container with other files inside."""
    with bstk.open(path) as file:
        data = {name: file.file(name) for name in file.files} | changed
        chunks = [c for c in file.chunks if c.kind != bstk.FILE]
        entries = [samples.entry(name, bstk.FILE, content) for name, content in data.items()]
        entries += [
            samples.entry(
                c.name, c.kind, file.read(c), level=c.level, shape=c.shape, dtype=c.dtype, rank=c.rank, transposed=c.transposed
            )
            for c in chunks
        ]  # fmt: skip
        bstk.write(target, file.metadata, entries, file.base_count + len(entries) - len(file.chunks))
    return target


def test_refused_without_the_flag(model, tmp_path, marker, run):
    with pytest.raises(ForeignCodeError, match="configuration_own.OwnConfig, modeling_own.OwnForCausalLM.*--trust-remote-code"):
        bstack.compress(model, tmp_path / "own.bstk", settings=SETTINGS)
    code, out, err = run("compress", model, "-o", tmp_path / "own.bstk", *QUICK)
    assert (code, out) == (2, "") and "--trust-remote-code" in err and err.count("\n") == 1
    assert marker.taken() == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_a_tokenizer_alone_is_refused_too(tiny_llama, tmp_path, marker, run):
    folder = shutil.copytree(tiny_llama, tmp_path / "own")
    put_modules(folder, marker)
    edit(
        folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )  # fmt: skip
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
        folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    )  # fmt: skip
    with pytest.warns(ForeignCodeWarning, match="helper.py, tokenization_own.py"):
        bstack.compress(folder, tmp_path / "out.bstk", settings=SETTINGS, trust_remote_code=True)
    assert marker.taken() == {"tokenizer"}
    forget()
    with pytest.warns(ForeignCodeWarning, match="helper.py, tokenization_own.py"):
        model, tokenizer = bstack.load(tmp_path / "out.bstk", trust_remote_code=True, code=folder)
    assert type(model).__module__.startswith("transformers.models.llama") and type(tokenizer).__name__ == "OwnTokenizerFast"
    assert marker.taken() == {"tokenizer"}


def test_the_file_holds_no_code_and_no_path(packed, tmp_path):
    with bstk.open(packed) as file:
        assert not [name for name in file.files if name.endswith(".py")]
        code = file.metadata["model"]["code"]
        assert code["from"] is None and set(code["modules"]) == {
            "configuration_own.py", "helper.py", "modeling_own.py", "tokenization_own.py"
        }
    assert str(tmp_path).encode() not in packed.read_bytes()


@pytest.mark.parametrize("mode", ["dense", "stack"])
def test_loads_with_the_flag_and_the_place(packed, model, marker, mode):
    with pytest.raises(ForeignCodeError, match="--trust-remote-code"):
        bstack.load(packed, mode=mode)
    with pytest.raises(ForeignCodeError, match="compressed from a folder.*--code"):
        bstack.load(packed, mode=mode, trust_remote_code=True)
    with pytest.raises(bstk.UsageError, match="--trust-remote-code"):
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
                    c.name, c.kind, file.read(c), level=c.level, shape=c.shape, dtype=c.dtype, rank=c.rank, transposed=c.transposed
                )
                for c in file.chunks if c.kind != bstk.FILE
            ]  # fmt: skip
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
        ("/abs/path/evil.Class", "'/abs/path/evil.Class'; allowed is module.Class"),
        ("../evil.Class", "allowed is module.Class"),
        ("modeling_own", "allowed is module.Class"),
        ("modeling_own.Own.Class", "allowed is module.Class"),
        ("absent.Class", "holds no absent.py"),
        ("latin.Class", "latin.py of .* cannot be read"),
        ("deep.Class", "imports .sub.mod"),
        ("up.Class", "imports .*transformers takes modules only from beside"),
        ("lost.Class", "its code is in nowhere.py of .* cannot be read"),
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
    measuring = ["bench", "own.bstk", "--windows", "2", "--sequence-length", "16", "--text", "text.txt", "--budgets", "100"]
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
    assert run(*measuring, "--original", "own", "--no-speed")[0] == 2
    assert marker.taken() == set()
    assert run(*measuring, "--original", "own", "--no-speed", "--trust-remote-code")[0] == 0


def test_code_of_the_hub(model, hub, tmp_path, marker):
    """Compressed from the hub, a file knows where the code is, and at which commit."""
    with pytest.raises(ForeignCodeError):
        open_checkpoint("owner/own")
    with pytest.warns(ForeignCodeWarning, match=f"owner/own@{'1' * 40}"):
        bstack.compress("owner/own", tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    with pytest.raises(ForeignCodeError):
        bstack.load(tmp_path / "own.bstk")
    marker.taken()
    with pytest.warns(ForeignCodeWarning, match=f"from owner/own@{'1' * 40}"):
        loaded, _ = bstack.load(tmp_path / "own.bstk", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    # A folder that borrows some of its code from there.
    borrowed = tmp_path / "borrowed"
    shutil.copytree(model, borrowed, ignore=shutil.ignore_patterns("*.py"))
    edit(borrowed / "config.json", auto_map={auto: f"owner/own--{name}" for auto, name in MAP.items()})
    with pytest.raises(bstk.BstkError, match="2 places"):
        open_checkpoint(borrowed, trust_remote_code=True)
    with pytest.raises(ForeignCodeError):
        open_checkpoint(borrowed)


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A cache of the hub in which owner/own is the model; its folder."""
    home = tmp_path / "hub" / "models--owner--own"
    shutil.copytree(model, home / "snapshots" / ("1" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return home


@pytest.fixture
def borrowed(model, tmp_path):
    """A folder that borrows all its code from there."""
    folder = tmp_path / "borrowed"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.py"))
    edit(folder / "config.json", auto_map={auto: f"owner/own--{name}" for auto, name in MAP.items()})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "owner/own--tokenization_own.OwnTokenizerFast"]})
    return folder


def test_the_code_that_runs_is_the_code_that_was_announced(hub, borrowed, tmp_path, marker, monkeypatch):
    """The hub has another commit as soon as the first one is fetched."""
    stranger = Marker(tmp_path / "stranger")
    put_modules(hub / "snapshots" / ("2" * 40), stranger)

    def fetched(*arguments):
        folder = hub_snapshot(*arguments)
        (hub / "refs" / "main").write_text("2" * 40)
        return folder

    monkeypatch.setattr("bstack.models.code.hub_snapshot", fetched)
    with pytest.warns(ForeignCodeWarning, match=f"owner/own@{'1' * 40}"):
        bstack.compress(borrowed, tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    assert (marker.taken(), stranger.taken()) == ({"configuration", "model", "tokenizer"}, set())
    with bstk.open(tmp_path / "own.bstk") as file:
        assert file.metadata["model"]["code"]["from"] == f"owner/own@{'1' * 40}"
    assert b"bstack-" not in (tmp_path / "own.bstk").read_bytes()


@pytest.mark.parametrize("place", ["owner/own", "borrowed"])
def test_an_exported_folder_says_where_on_the_hub_its_code_is(place, hub, borrowed, tmp_path, marker, run):
    source = borrowed if place == "borrowed" else place
    with pytest.warns(ForeignCodeWarning):
        bstack.compress(source, tmp_path / "own.bstk", settings=SETTINGS, trust_remote_code=True)
    arguments = ["export", tmp_path / "own.bstk", "--to", "safetensors", tmp_path / "out", "--trust-remote-code"]
    status, out, err = run(*arguments, "--json")
    assert status == 0 and json.loads(out)["code"] == [], err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {auto: f"owner/own--{name}" for auto, name in MAP.items()}
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"]
    assert "owner/own--tokenization_own.OwnTokenizerFast" in found
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_an_exported_folder_needs_the_code_of_a_folder_beside_it(packed, model, tmp_path, run):
    arguments = ["export", packed, "--to", "safetensors", tmp_path / "out", "--trust-remote-code", "--code", model]
    status, out, _ = run(*arguments)
    modules = ["configuration_own.py", "helper.py", "modeling_own.py", "tokenization_own.py"]
    assert status == 0 and f"put its Python code beside it: {', '.join(modules)}" in out
    assert not list((tmp_path / "out").glob("*.py"))
    for name in modules:
        shutil.copy(model / name, tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__ == "OwnForCausalLM"


def test_a_configuration_chooses_no_kernels_of_the_hub(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    edit(folder / "config.json", attn_implementation="owner/kernel", experts_implementation="owner/kernel")
    config = open_checkpoint(folder).config
    assert config._attn_implementation is None and config._experts_implementation is None
    edit(folder / "config.json", attn_implementation="eager")
    assert open_checkpoint(folder).config._attn_implementation == "eager"


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
    folder = staged(model, code)
    copied = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder.parent)
    assert copied == {*read, *own, *code.modules}


@pytest.mark.skipif(sys.platform != "linux", reason="a file that nobody can read, root neither")
def test_a_file_that_cannot_be_read_is_named(model, tmp_path, marker, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (model / "notes.txt").symlink_to("/proc/self/mem")
    with pytest.warns(ForeignCodeWarning), pytest.raises(UnsupportedModelError, match=rf"^{model}/notes.txt cannot be read: "):
        open_checkpoint(model, trust_remote_code=True)
    assert not list((tmp_path / "temporary").iterdir())


def test_no_question_is_asked(model, monkeypatch):
    """transformers asks on standard input where it is not told; nothing of bstack leaves it to that."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with warnings.catch_warnings(action="error"), pytest.raises(ForeignCodeError):
        open_checkpoint(model)
