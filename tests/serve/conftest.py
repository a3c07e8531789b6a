import re
import signal
import subprocess
import sys

import pytest
import tiny_models

import bstack

TEMPLATE = """
{%- if tools %}[tools] {{ tools | tojson }} {% endif %}
{%- for m in messages %}[{{ m.role }}] {{ m.content }} {% for call in m.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 letters") }}{% endif %}[call] {{ call.function | tojson }} {% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}[bot] {% endif %}
{%- if enable_thinking %}<think>{% endif %}"""


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """A tiny model that reads 1024 tokens and has a chat template."""
    folder = tmp_path_factory.mktemp("serve")
    source = tiny_models.add_tokenizer(tiny_models.save("llama", folder / "model", max_position_embeddings=1024))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    settings = bstack.Settings(codec="trellis", planes=3, samples=4, sequence_length=32)
    bstack.compress(source, folder / "tiny.bstk", settings=settings)
    return folder / "tiny.bstk"


class Server:
    """A server in a process of its own."""

    def __init__(self, path, *options):
        for package in ("starlette", "uvicorn", "prometheus_client"):
            pytest.importorskip(package, reason="the server needs it")
        command = [sys.executable, "-m", "bstack", "serve", str(path), "--port", "0", "--mb", "100", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log = ""
        while not (found := re.search(r"Listening at (http://\S+)", self.log)):
            line = self.process.stderr.readline()
            assert line, self.log
            self.log += line
        self.url = found[1]

    def stop(self, number=signal.SIGTERM):
        """End it as a user does; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=300)
        self.log += out + err
        return self.process.returncode


@pytest.fixture
def start(served_model):
    """Start servers with options; they are ended afterwards."""
    started = []

    def begin(*options, path=served_model):
        started.append(Server(path, *options))
        return started[-1]

    yield begin
    for server in started:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(served_model):
    """A server that a module shares; it must end without a word in its log."""
    running = Server(served_model)
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log and "ERROR" not in running.log, running.log
