import bstack
import pytest
import tiny_models

SETTINGS = bstack.Settings(codec="trellis", planes=3, samples=4, sequence_length=32)


@pytest.fixture(scope="session")
def file_of(tmp_path_factory):
    """A compressed tiny model by its name in tiny_models, made once."""
    made = {}

    def get(name, **changes):
        if name not in made:
            folder = tmp_path_factory.mktemp("runtime")
            model = tiny_models.add_tokenizer(tiny_models.save(name, folder / "model", **changes))
            bstack.compress(model, folder / "model.bstk", settings=SETTINGS)
            made[name] = folder / "model.bstk"
        return made[name]

    return get
