import os

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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer; nobody writes into it."""
    import tiny_models

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return tiny_models.add_tokenizer(tiny_models.save("llama", folder))
