"""What the docs say of the repository is true: commands, links, paths, examples."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "format" / "SPEC.md"])

each_document = pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)

_spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
make_commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_commands)


def prose(text):
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors that a web view of the document gives its headings."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_command_reference_is_what_the_commands_say():
    # Words, not spaces: click's versions break lines differently.
    expected = make_commands.TARGET.read_text(encoding="utf-8").split()
    assert make_commands.render().split() == expected, "run python docs/make_commands.py"


@each_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name}" not in readme] == []


@each_document
def test_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:bstack|format|csrc|docs|tests|benchmarks)/[\w./-]*)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name
    # In the docs a module of bstack may go without the package's name.
    for name in re.findall(
        r"`((?:models|calibration|codecs|numerics|kernels|ordering|pipeline|runtime|measure)/[\w./]+\.py)`", text
    ):
        assert (ROOT / "bstack" / name).exists(), name


@each_document
def test_python_examples_are_python(document):
    for code in re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        ast.parse(code)


@each_document
def test_commands_in_examples_exist(document):
    known = set(re.findall(r"^## bstack (\S+)$", make_commands.TARGET.read_text(encoding="utf-8"), re.MULTILINE))
    assert known
    text = document.read_text(encoding="utf-8")
    used = re.findall(r"(?:^\$ |`)bstack ([a-z]+)", text, re.MULTILINE)
    assert set(used) <= known


def test_the_two_commands_are_on_the_first_screen():
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20]
    for target in ("demo", "test"):
        assert any(line.startswith(f"$ make {target}") for line in first)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
