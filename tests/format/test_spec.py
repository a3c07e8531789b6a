"""The tables of SPEC.md that the code has as tables too."""

import re
from pathlib import Path

from bstk import kinds
from bstk.preamble import SPECIFICATION

SPEC = (Path(__file__).parents[2] / "format" / "SPEC.md").read_text()


def section(number):
    return SPEC.split(f"\n## {number}. ")[1].split("\n## ")[0]


def test_version():
    assert SPEC.startswith(f"# The `.bstk` container, version {SPECIFICATION}\n")
    assert re.findall(r"^\| (\d+\.\d+) \|", SPEC.split("## Version log")[1], re.MULTILINE)[-1] == SPECIFICATION


def test_element_types():
    codes, names, sizes = (
        [cell.strip() for cell in re.search(rf"^\| {what} \|(.*)\|$", section(5), re.MULTILINE)[1].split("|")]
        for what in ("code", "dtype", "bytes")
    )
    assert [(int(c), n, int(s)) for c, n, s in zip(codes, names, sizes, strict=True)] == [
        tuple(d) for d in kinds.DTYPE_BY_CODE.values()
    ]


def test_kinds():
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (yes|no) \| (yes|no) \|", section(6), re.MULTILINE)
    stated = [(int(code), name, weight == "yes", block == "yes") for code, name, weight, block in rows]
    assert stated == [(kind.code, kind.name, kind.is_weight, kind.is_block) for kind in kinds.BY_CODE.values()]
    for kind in kinds.BY_CODE.values():
        assert f"\n**{kind.name}**: " in section(6), "each kind's raw bytes are described"
