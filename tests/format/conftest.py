import pytest
import samples
from served_files import long_head, model  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> bytes:
    """The bytes of a small good file."""
    return samples.write(tmp_path_factory.mktemp("good") / "good.bstk")


@pytest.fixture
def good_path(tmp_path, good):
    """The small good file on disk, one's own copy."""
    path = tmp_path / "good.bstk"
    path.write_bytes(good)
    return path
