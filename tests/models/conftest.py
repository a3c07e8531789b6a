"""Folders with tiny models that the tests of this part share."""

from __future__ import annotations

import shutil

import pytest
import tiny_models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of an architecture; nobody writes into it."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tiny_models.save(name, tmp_path_factory.mktemp("saved") / name)
        return made[name]

    return get


@pytest.fixture
def model(saved, tmp_path):
    """A copy of such a folder that a test may change."""
    return lambda name: shutil.copytree(saved(name), tmp_path / name)
