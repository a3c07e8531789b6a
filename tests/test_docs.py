"""Check what the documents say of the repository: commands, links, paths, and examples that run."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import in_process
import pytest

import bstk
from bstack.cli._text import original_fields

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "format" / "SPEC.md", ROOT / "format/js/README.md"]
)
PAGES = 13  # with SPEC.md, the generated commands and architectures, the notebook: a page too many is a page that nobody keeps true
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCS, ids=lambda path: str(path.relative_to(ROOT)))

_spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
make_commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_commands)


def read(document):
    return document.read_text(encoding="utf-8")


def prose(text):
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors that a web view of the document gives its headings."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_command_reference_is_what_the_commands_say():
    # Words, not spaces: click's versions break lines differently.
    expected = read(make_commands.TARGET).split()
    assert make_commands.render().split() == expected, "run python docs/make_commands.py"


@each_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(document))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(read(file)), target


def test_the_readme_leads_to_every_page():
    readme = read(ROOT / "README.md")
    assert [page for page in DOCS if page.name != "README.md" and f"]({page.relative_to(ROOT)}" not in readme] == []
    assert len(DOCS) <= PAGES


@each_document
def test_named_files_exist(document):
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for name in re.findall(r"`([\w.-]+/[\w./-]*)`", prose(read(document))):
        is_file = name.partition("/")[0] in folders or re.search(r"\.(py|c|h|js|md|svg)$", name)
        assert not is_file or "NAME" in name or (ROOT / name).exists(), name


def test_the_file_tree_of_the_readme_is_there():
    tree = re.search(r"^bstack/ .*?^```", read(ROOT / "README.md"), re.MULTILINE | re.DOTALL).group()
    top = None
    for indent, name in re.findall(r"^( *)([\w-]+)/ ", tree, re.MULTILINE):
        top = top if indent else name
        assert (ROOT / top / name if indent else ROOT / name).is_dir(), name
    packages = {path.parent.name for path in (ROOT / "bstack").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^  ([\w-]+)/ ", tree, re.MULTILINE))


def test_the_walks_through_the_code_name_what_is_there():
    walks = read(ROOT / "CONTRIBUTING.md").partition("## Three walks")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in re.findall(r"^\|.*\|$", walks, re.MULTILINE)]
    checked = 0
    for step, place in rows:
        files = re.findall(r"`([\w./-]+\.(?:py|c))`", place)
        for name in re.findall(r"`([\w.]+)`", step) if files else []:
            word = re.compile(rf"\b{re.escape(name.rpartition('.')[2])}\b")
            assert any(word.search(read(ROOT / file)) for file in files), f"{name} in {place}"
            checked += 1
    assert checked >= 25


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the examples name: ./Llama-3.1-8B, a tiny stand-in, and made from it llama.bstk and corpus.txt."""
    import tiny_models

    import bstack

    folder = tmp_path_factory.mktemp("examples")
    model = tiny_models.save("llama", folder / "Llama-3.1-8B", max_position_embeddings=512)
    tiny_models.add_tokenizer(model)
    (folder / "corpus.txt").write_text(tiny_models.text(3000))
    quick = bstack.Settings(calibration=str(folder / "corpus.txt"), samples=2, sequence_length=64)
    bstack.compress(model, folder / "llama.bstk", settings=quick)
    (folder / "llama.root").write_text("0" * 64)
    return folder


def examples():
    for document in DOCS:
        blocks = list(BLOCK.finditer(read(document)))
        if blocks:
            yield pytest.param(document, blocks, id=str(document.relative_to(ROOT)))


@pytest.mark.parametrize(("document", "blocks"), list(examples()))
@pytest.mark.filterwarnings("ignore")
def test_python_examples_run(document, blocks, workplace, tmp_path, monkeypatch):

    with bstk.open(workplace / "llama.bstk") as file:  # the stand-in is smaller than any size in an example
        size = (file.base.budget + file.complete.budget) / 2 / bstk.MB
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = {}  # the blocks of a page go on from each other
    for block in blocks:
        line = read(document)[: block.start("code")].count("\n")
        source = re.sub(r"\bmb=[\d.]+", f"mb={size}", block["code"])
        code = compile("\n" * line + source, document, "exec")
        if not block["reason"]:
            # The first example compresses to a file that lies there for the other pages.
            if "bstack.compress(" in block["code"]:
                (tmp_path / "llama.bstk").unlink(missing_ok=True)
            exec(code, names)


def test_few_examples_are_not_run():
    blocks = [match for document in DOCS for match in BLOCK.finditer(read(document))]
    assert len(blocks) >= 6 and sum(bool(block["reason"]) for block in blocks) <= 1


def test_the_output_in_the_guide_is_what_the_commands_print(workplace, tmp_path):
    """Line by line without the numbers; the lines of the original, which a model from a folder does not print, with them."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    blocks = re.findall(r"^```console\n(.*?)^```", read(ROOT / "docs" / "guide.md"), re.MULTILINE | re.DOTALL)
    shown = next(block for block in blocks if "bstack compress smollm2" in block)
    quick = "--calibration corpus.txt --samples 2 --sequence-length 64"
    printed = in_process.bstack(*f"compress Llama-3.1-8B -o smollm2.bstk {quick}".split(), cwd=tmp_path).stdout
    with bstk.open(tmp_path / "smollm2.bstk") as file:
        size = (file.base.budget + file.complete.budget) / 2 / bstk.MB
    printed += in_process.bstack("truncate", "smollm2.bstk", "--mb", size, "-o", "small.bstk", cwd=tmp_path).stdout
    printed += in_process.bstack("verify", "small.bstk", cwd=tmp_path).stdout

    def plain(text):
        return [re.sub(r"[\d,.]+( MB| bytes)?", "N", line) for line in text.splitlines() if not line.startswith("$")]

    smollm2 = {"original_bytes": 98367234, "original_dtype": "bfloat16", "original_dtype_bytes": 269030016}
    original = [f"  {key:<14} {text}" for key, text in original_fields({**smollm2, "source_quantisation": "GGUF Q4_1"})]
    lines = shown.splitlines()
    assert original == lines[2:4]
    assert [line for line in plain(shown) if line not in plain("\n".join(original))] == [
        line for line in plain(printed) if not re.match(r"  (original|time|peak memory|root)", line)
    ]


@each_document
def test_commands_in_examples_are_understood(document, workplace, monkeypatch):
    from bstack.cli import main

    monkeypatch.chdir(workplace)
    text = read(document)
    for line in re.findall(r"^(?:\$ |  {0,3})(bstack (?:.*\\\n)*.*)$", text, re.MULTILINE):
        line = re.sub(r"\$\([^)]*\)", "0" * 64, line.replace("\\\n", " ")).replace("...", "0" * 52)
        _, name, *words = shlex.split(line.partition(" | ")[0], comments=True)
        command = main.get_command(None, name)
        assert command is not None, line
        for file in words:
            if re.fullmatch(r"[\w-]+\.bstk|[\w.-]+\.txt|FILE|IN", file) and not Path(file).exists():
                shutil.copy("llama.bstk", file)
        # Options and their values are checked; the command is not run.
        command.make_context(name, words)
    for name in re.findall(r"`bstack ([a-z]+)", text):
        assert main.get_command(None, name) is not None, name


def test_the_first_screen_has_the_commands_and_the_picture():
    first = read(ROOT / "README.md").splitlines()[:20]
    for target in ("demo", "test"):
        assert any(line.startswith(f"$ make {target}") for line in first)
        assert re.search(rf"^{target}:", read(ROOT / "Makefile"), re.MULTILINE)
    assert any("](docs/quality.svg)" in line for line in first)
    assert any("original, bfloat16" in line for line in first)
