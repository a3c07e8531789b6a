"""What is published: the wheel, not the checkout."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip builds the wheel"),
    pytest.mark.slow,
]


# Imported only where their package is installed.
NEEDS_AN_EXTRA = {"bstack.kernels.cuda.driver", "bstack.kernels.device", "bstack.serve.app", "bstack.serve.metrics"}


def packages() -> dict[str, Path]:
    """Every package of the source tree by its import name: the folders with an __init__.py."""
    found = {}
    for top, folder in (("bstack", ROOT / "bstack"), ("bstk", ROOT / "format" / "bstk")):
        for marker in sorted(folder.rglob("__init__.py")):
            found[".".join((top, *marker.parent.relative_to(folder).parts))] = marker.parent
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what is tracked, so that of the checkout's leftovers the kernels alone take part."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("bstack", "format", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    # The kernels that were built with this checkout are newer than their source here, and are not compiled once more.
    built = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "bstack" / "kernels"
    built.mkdir(parents=True)
    for library in (ROOT / "bstack" / "kernels").glob("_native*"):
        shutil.copyfile(library, built / library.name)
    # With setuptools at hand nothing has to be fetched.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "--wheel-dir", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("bstack-*.whl")
    return built


def test_every_module_is_in_it_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = set()
    for package, folder in packages().items():
        shipped = [file for pattern in ("*.py", "py.typed", "*.html", "*.cu") for file in folder.glob(pattern)]
        expected |= {f"{package.replace('.', '/')}/{file.name}" for file in shipped}
    assert len(expected) > 40 and expected <= names, sorted(expected - names)
    others = {name for name in names - expected if ".dist-info/" not in name}
    # The kernels, where there is a compiler.
    assert all(name.startswith("bstack/kernels/_native.") for name in others), others
    assert any(name.endswith("LICENSE") for name in names)


def test_what_it_brings_along(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        needed = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    base = {re.split(r"[<>=;\s]", line)[0] for line in needed if "extra ==" not in line}
    assert base == {"backports.zstd", "click", "jinja2", "numpy", "psutil", "tokenizers", "tqdm"}
    extras = [line for line in needed if re.search(r"extra == .compress", line)]
    assert {"safetensors", "torch", "transformers"} < {re.split(r"[<>=;\s]", line)[0] for line in extras}


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Scripts of an environment of its own, with the wheel installed and this environment's other packages in reach."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    install = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = folder.rglob("site-packages")
    # A path in a .pth file is searched last, and the .pth files that lie there, such as this checkout's, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return scripts


def run(*command, cwd):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_works_where_the_checkout_is_not(clean, tiny_llama, tmp_path):
    where = "import bstack, bstk; print(bstack.__file__); print(bstk.__file__)"
    for line in run(clean / "python", "-I", "-c", where, cwd=tmp_path).splitlines():
        assert Path(line).is_relative_to(clean.parent)
    assert run(clean / "bstack", "--version", cwd=tmp_path).startswith("bstack ")
    quick = ["--samples", 2, "--sequence-length", 16, "-q"]
    run(clean / "bstack", "compress", tiny_llama, "-o", "tiny.bstk", *quick, cwd=tmp_path)
    assert "good" in run(clean / "bstack", "verify", "tiny.bstk", cwd=tmp_path)


def test_every_module_of_it_can_be_imported(clean, tmp_path):
    modules = [
        f"{package}.{module.stem}" if module.stem != "__init__" else package
        for package, folder in packages().items()
        for module in sorted(folder.glob("*.py"))
        if module.stem != "__main__" and f"{package}.{module.stem}" not in NEEDS_AN_EXTRA
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    run(clean / "python", "-I", "-c", code, *modules, cwd=tmp_path)
