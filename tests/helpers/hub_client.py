"""A fixture that points huggingface_hub, which reads its settings when it is imported, and ``hf://`` to a stand-in for the hub."""

from contextlib import ExitStack

import pytest
from hub_server import HubServer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a folder: ``hub(folder)``."""
    settings = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def serve(folder, **settings):
        server = servers.enter_context(HubServer(folder, **settings))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.base)
        template = server.base + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", server.base)
        return server

    with ExitStack() as servers:
        yield serve
