import pytest
import tiny_models
from native_models import MODELS

import bstack

SETTINGS = {
    "trellis": {"planes": 3},
    "sign": {"planes": 2, "rank": 2},
    "spqr": {"bits": 3, "planes": 1},
    "spqr, no outliers": {"codec": "spqr", "planes": 1, "outliers": 0},
}


@pytest.fixture(scope="session")
def file_of(tmp_path_factory):
    """A compressed tiny model by its name in tiny_models, made once."""
    made = {}

    def get(name, codec="trellis", **changes):
        if (name, codec) not in made:
            folder = tmp_path_factory.mktemp("runtime")
            model = tiny_models.add_tokenizer(tiny_models.save(name, folder / "model", **changes))
            settings = bstack.Settings(**{"codec": codec, "samples": 4, "sequence_length": 32, **SETTINGS[codec]})
            bstack.compress(model, folder / "model.bstk", settings=settings)
            made[name, codec] = folder / "model.bstk"
        return made[name, codec]

    return get


@pytest.fixture
def path(file_of):
    """The file of a tiny Llama; a test module may put another in its place."""
    return file_of("llama")


@pytest.fixture
def model(path):
    """It, loaded with packed weights."""
    return bstack.load(path, mode="packed")[0]


@pytest.fixture(scope="session")
def native_file(tmp_path_factory):
    """A compressed tiny model by its name in native_models.MODELS, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("native")
            kind, changes = MODELS[name]
            settings = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16)
            source = tiny_models.add_tokenizer(tiny_models.save(kind, folder / "model", **changes))
            bstack.compress(source, folder / "model.bstk", settings=settings)
            made[name] = folder / "model.bstk"
        return made[name]

    return get
