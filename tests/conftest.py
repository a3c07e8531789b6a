import os
import sys

# Before torch is imported, here and in the commands that tests start: many threads on tiny matrices cost time only.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before triton is imported, too: without a GPU its kernels are interpreted.
if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
from hub_client import hub  # noqa: F401 (fixture)
from hypothesis import HealthCheck, settings

# The same examples each time, in any time: a test fails by what it tests and not by chance. `--hypothesis-profile default` draws others.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Put files with slow tests first, so that no process works on one while the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """What a test draws from torch does not depend on the tests before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer; nobody writes into it."""
    import tiny_models

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return tiny_models.add_tokenizer(tiny_models.save("llama", folder))
