import pytest
import tiny_models

from bstack.models.safetensors import SafetensorsCheckpoint
from bstack.models.skeleton import Skeleton


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Skeleton(
                SafetensorsCheckpoint(tiny_models.save(name, tmp_path_factory.mktemp(name) / "model"))
            )
        return made[name]

    return get
