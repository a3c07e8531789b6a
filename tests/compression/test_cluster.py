"""``--dask``: the same file byte for byte from the workers of a cluster, also when one is killed in the middle."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import bstack
import bstk
from bstack.cli import main
from bstack.compression import cluster
from bstk.errors import BstkError, Interrupted

pytestmark = pytest.mark.slow

distributed = pytest.importorskip("distributed", reason="distributed is not installed: pip install 'bstack[dask]'")
dask = pytest.importorskip("dask")

SETTINGS = bstack.Settings(planes=2, samples=2, sequence_length=16)
QUICK = ["--planes", "2", "--samples", "2", "--sequence-length", "16"]
# A process that has imported what takes seconds. Each that is started is a child of it, which does some Python of the test's own
# and then what the command `dask` does.
MOTHER = """
import contextlib, json, os, signal, sys
import dask.__main__, distributed.cli.dask_scheduler, distributed.cli.dask_worker, torch

def reap(*_):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass

signal.signal(signal.SIGCHLD, reap)
while line := sys.stdin.readline():
    before, arguments, environment = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        os.environ.update(environment)
        dask.config.refresh()
        sys.argv[:] = ["dask", *arguments]
        exec(before)
        dask.__main__.main()
        os._exit(0)
    print(pid, flush=True)
"""


class Process:
    def __init__(self, pid):
        self.pid = pid

    def kill(self):
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def has_ended(self):
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


@pytest.fixture(scope="module")
def mother():
    with subprocess.Popen(
        [sys.executable, "-c", MOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


class Processes(list):
    """Those that were started, which end with the test or the module."""

    def __init__(self, mother):
        self._mother = mother

    def start(self, *arguments, before="pass", **environment):
        print(json.dumps([before, arguments, environment]), file=self._mother.stdin, flush=True)
        self.append(Process(int(self._mother.stdout.readline())))
        return self[-1]

    def end(self):
        for process in self:
            process.kill()
        wait_for(lambda: all(process.has_ended() for process in self))


@pytest.fixture
def processes(mother):
    started = Processes(mother)
    yield started
    started.end()


def start_scheduler(processes, folder, **environment):
    file = folder / "scheduler.json"
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    processes.start("scheduler", *arguments, **environment)
    wait_for(lambda: file.exists() and file.read_text().endswith("}"))
    return json.loads(file.read_text())["address"]


def start_worker(processes, scheduler, folder, **options):
    arguments = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(folder / "dask")]
    return processes.start("worker", scheduler, *arguments, **options)


@pytest.fixture(scope="module")
def lasting(mother):
    """Processes that all tests share."""
    started = Processes(mother)
    yield started
    started.end()


@pytest.fixture(scope="module")
def lasting_scheduler(lasting, tmp_path_factory):
    return start_scheduler(lasting, tmp_path_factory.mktemp("scheduler"))


@pytest.fixture(scope="module")
def two_workers(lasting, tmp_path_factory):
    """The address of a scheduler with two workers that have two threads for each product."""
    folder = tmp_path_factory.mktemp("workers")
    address = start_scheduler(lasting, folder)
    for _ in range(2):
        start_worker(lasting, address, folder, before="torch.set_num_threads(2)", OMP_NUM_THREADS="2")
    with distributed.Client(address, timeout=300, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=300)
    return address


@pytest.fixture
def scheduler(processes, tmp_path, request):
    """The address of the scheduler that tests share, without workers; with a parameter one of its own, in that environment."""
    if hasattr(request, "param"):
        return start_scheduler(processes, tmp_path, **request.param)
    return request.getfixturevalue("lasting_scheduler")


@pytest.fixture
def client(scheduler):
    with distributed.Client(scheduler, timeout=300, set_as_default=False) as client:
        yield client


@pytest.fixture
def add_workers(processes, scheduler, client, tmp_path):
    workers = []

    def add(count, **options):
        before = len(client.nthreads())
        made = [start_worker(processes, scheduler, tmp_path, **options) for _ in range(count)]
        workers.extend(made)
        client.wait_for_workers(before + count, timeout=300)
        return made

    yield add
    for worker in workers:
        worker.kill()
    if processes[0] in workers:  # the scheduler is a shared one
        wait_for(lambda: not client.nthreads())


@pytest.fixture(scope="module")
def expected(tiny_llama, tmp_path_factory):
    return compressed(tiny_llama, tmp_path_factory.mktemp("expected"), SETTINGS)


def compressed(model, folder, settings, **options):
    bstack.compress(model, folder / "out.bstk", settings=settings, **options)
    return (folder / "out.bstk").read_bytes()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main.main(["compress", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err and "bug in bstack" not in err
    return caught.value.code, out, err


def busy(client):
    """A worker that has a matrix in work; None when there is none."""
    return next((worker for worker, tasks in client.processing().items() if tasks), None)


def test_the_same_file(tiny_llama, tmp_path, two_workers, expected, capsys):
    assert run(capsys, tiny_llama, "-o", tmp_path / "out.bstk", "--dask", two_workers, *QUICK)[0] == 0
    assert (tmp_path / "out.bstk").read_bytes() == expected


@pytest.mark.parametrize("codec", ["trellis", "spqr", "sign"])
def test_the_same_file_with_another_number_of_threads(codec, tiny_llama, tmp_path_factory, two_workers):
    settings = replace(SETTINGS, codec=codec)
    here = compressed(tiny_llama, tmp_path_factory.mktemp("here"), settings)
    assert compressed(tiny_llama, tmp_path_factory.mktemp("there"), settings, dask=two_workers) == here


def test_a_worker_is_killed(tiny_llama, tmp_path, scheduler, client, add_workers, expected):
    workers = add_workers(2, BSTACK_KERNELS="reference")  # slow, with the same result bit for bit
    by_address = dict(client.run(os.getpid))
    killed = []

    def kill_one():
        address = wait_for(lambda: busy(client))
        os.kill(by_address[address], signal.SIGKILL)
        killed.append(by_address[address])

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.warns(RuntimeWarning, match="kernels reference"):
        bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=SETTINGS, dask=scheduler)
    killer.join()
    assert [worker.pid for worker in workers if worker.has_ended()] == killed
    assert (tmp_path / "out.bstk").read_bytes() == expected


@pytest.mark.parametrize("scheduler", [{}], indirect=True)
def test_the_scheduler_goes_away_and_the_same_command_goes_on(
    tiny_llama, tmp_path, scheduler, client, processes, add_workers, expected, capsys
):
    add_workers(1, BSTACK_KERNELS="reference")
    threading.Thread(target=lambda: (wait_for(lambda: busy(client)), processes[0].kill())).start()
    code, _, err = run(capsys, tiny_llama, "-o", tmp_path / "out.bstk", "--dask", scheduler, *QUICK)
    assert code == 75 and "went away" in err and "same command again" in err, err
    assert (tmp_path / "out.bstk.work").is_dir() and not (tmp_path / "out.bstk").exists()
    assert run(capsys, tiny_llama, "-o", tmp_path / "out.bstk", *QUICK)[0] == 0
    assert (tmp_path / "out.bstk").read_bytes() == expected


def test_interrupted(tiny_llama, tmp_path, scheduler, client, add_workers, expected, capsys):
    add_workers(1, BSTACK_KERNELS="reference")
    command = [sys.executable, "-m", "bstack", "compress", tiny_llama, "-o", tmp_path / "out.bstk", *QUICK]
    process = subprocess.Popen([*command, "--dask", scheduler], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: busy(client))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75 and "Give the same command again" in err and "Traceback" not in err
    wait_for(lambda: not busy(client))
    assert run(capsys, tiny_llama, "-o", tmp_path / "out.bstk", *QUICK)[0] == 0
    assert (tmp_path / "out.bstk").read_bytes() == expected


def test_an_error_in_the_event_loop_of_dask_prints_no_traceback(two_workers, caplog):
    done = threading.Event()
    with cluster.Cluster(two_workers) as workers:
        # Dask's own cancel() raises NameError there where Ctrl-C comes before its future.
        workers.client.loop.add_callback(lambda: 1 / 0)
        workers.client.loop.add_callback(done.set)
        assert done.wait(300)
    assert "ZeroDivisionError" not in caplog.text


def test_workers_come_late_or_not_at_all(tiny_llama, tmp_path, scheduler, client, add_workers, expected, monkeypatch):
    (worker,) = add_workers(1, BSTACK_KERNELS="reference")
    monkeypatch.setattr("bstack.compression.cluster.POLL_SECONDS", 0.1)
    monkeypatch.setattr("bstack.compression.cluster.PATIENCE_SECONDS", 1.0)
    threading.Thread(target=lambda: (wait_for(lambda: busy(client)), worker.kill())).start()
    with pytest.raises(Interrupted, match="no workers for 1 s"), pytest.warns(RuntimeWarning):
        bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=SETTINGS, dask=scheduler)
    monkeypatch.setattr("bstack.compression.cluster.CONNECT_SECONDS", 300.0)
    threading.Timer(1, lambda: add_workers(1)).start()
    bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=SETTINGS, dask=scheduler)
    assert (tmp_path / "out.bstk").read_bytes() == expected


def test_a_worker_that_comes_late_with_other_kernels_is_told_of_once(scheduler, client, add_workers):
    (first,) = add_workers(1)
    with cluster.Cluster(scheduler) as workers:
        assert workers.submit(os.getpid).result() == first.pid
        first.kill()
        wait_for(lambda: not client.nthreads())
        (late,) = add_workers(1, BSTACK_KERNELS="reference")
        with pytest.warns(RuntimeWarning, match="kernels reference") as warned:
            assert [workers.submit(os.getpid).result() for _ in range(3)] == [late.pid] * 3
        assert len(warned) == 1


def test_an_encoder_that_times_out_is_not_asked_for_ever():
    class Failed:
        status, asked = "error", 0

        def result(self, timeout):
            self.asked += 1
            raise self.exception() if self.asked < 5 else AssertionError("asked again and again")

        def exception(self):
            return TimeoutError("a slow disk")

    workers = SimpleNamespace(client=SimpleNamespace(status="running"), count_threads=lambda: 1)
    with pytest.raises(TimeoutError, match="a slow disk"):
        cluster._Task(workers, Failed()).result()


@pytest.mark.parametrize("scheduler", [{"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}], indirect=True)
def test_workers_that_keep_dying(tiny_llama, tmp_path, scheduler, add_workers):
    """A matrix over which every worker dies is not tried for ever."""
    kill = "import os; import bstack.compression.encode as e; e.encode_arrays = lambda *_: os._exit(9)"
    add_workers(1, before=kill)
    with pytest.raises(Interrupted, match="died over the same matrix"):
        bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=SETTINGS, dask=scheduler)


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (
            "import importlib.metadata as m; v = m.version; m.version = lambda p: '0.0.9' if p == 'bstack' else v(p)",
            "bstack 0.0.9, not",
        ),
        (
            "import importlib.metadata as m; v = m.version; m.version = lambda p: '1.0' if p == 'torch' else v(p)",
            "torch 1.0, not",
        ),
        ("import sys; sys.modules['bstack'] = None", "cannot run bstack"),
    ],
)
def test_workers_with_other_versions(tiny_llama, tmp_path, scheduler, add_workers, before, words, capsys):
    add_workers(1, before=before)
    code, out, err = run(capsys, tiny_llama, "-o", tmp_path / "out.bstk", "--dask", scheduler, *QUICK)
    assert (code, out) == (1, "") and words in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("tcp://127.0.0.1:1", 1, "No Dask scheduler answers"),
        ("http://127.0.0.1:1", 1, "No Dask scheduler answers"),
        ("nonsense", 2, "is not the address of a Dask scheduler, such as tcp://"),
        ("", 2, "is not the address of a Dask scheduler, such as tcp://"),
    ],
)
def test_no_scheduler(tiny_llama, tmp_path, address, code, words, capsys, monkeypatch):
    monkeypatch.setattr("bstack.compression.cluster.CONNECT_SECONDS", 0.5)
    *answer, err = run(capsys, tiny_llama, "-o", tmp_path / "out.bstk", "--dask", address, *QUICK)
    assert answer == [code, ""] and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


_CONNECT = """
import sys
from bstack.compression import cluster
cluster.CONNECT_SECONDS = 1.0
for address in sys.argv[1:]:
    try:
        cluster.Cluster(address)
    except cluster.BstkError as error:
        print(error)
"""


def test_a_wrong_host_is_one_line_and_nothing_of_dask_behind_it():
    """In a process of its own, as dask's words came when it ended."""
    answers = [None, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b""]
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in answers]

    def serve(server, answer):
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.sendall(answer or b"")
                connection.close()

    addresses = []
    for server, answer in zip(servers, answers, strict=True):
        addresses.append(f"{'tls' if answer is None else 'tcp'}://127.0.0.1:{server.getsockname()[1]}")
        threading.Thread(target=serve, args=(server, answer), daemon=True).start()
    done = subprocess.run([sys.executable, "-c", _CONNECT, *addresses], capture_output=True, text=True)
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    lines = done.stdout.splitlines()
    assert len(lines) == len(addresses)
    for line, address in zip(lines, addresses, strict=True):
        assert line.startswith(f"No Dask scheduler answers at {address}: ")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def impatient(monkeypatch):
    """Wait long for a scheduler, and hardly for workers."""
    wait = distributed.Client.wait_for_workers
    monkeypatch.setattr(distributed.Client, "wait_for_workers", lambda self, count, timeout: wait(self, count, 0.2))
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 300.0)


def test_no_workers(tiny_llama, tmp_path, scheduler, impatient):
    with pytest.raises(BstkError, match="no workers"):
        bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=SETTINGS, dask=scheduler)


PEM = str(Path(__file__).parents[1] / "helpers" / "self-signed.pem")
TLS = {"distributed.comm.tls.ca-file": PEM} | {
    f"distributed.comm.tls.{role}.{what}": PEM for role in ("scheduler", "client") for what in ("cert", "key")
}
_ENCRYPTED = {"DASK_" + name.upper().replace(".", "__").replace("-", "_"): value for name, value in TLS.items()}


@pytest.mark.parametrize("scheduler", [{"DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME": "tls", **_ENCRYPTED}], indirect=True)
def test_an_encrypted_scheduler_that_dask_settings_tell_how_to_reach(scheduler, impatient):
    assert scheduler.startswith("tls://")
    with dask.config.set(TLS), pytest.raises(BstkError, match="has no workers"):
        cluster.Cluster(scheduler)


def test_distributed_is_not_installed(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(bstk.BstkError, match=r"pip install 'bstack\[dask\]'"):
        bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=SETTINGS, dask="tcp://127.0.0.1:1")
