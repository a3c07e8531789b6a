"""Stands in for CUDA graphs on the CPU: what runs between begin and end is kept, operation by operation on the same tensors, and runs again.

As on a GPU, recording changes no tensor, numbers of Python are frozen, and an operation whose result the host needs fails.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique_consecutive"}


class Waits(TorchDispatchMode):
    """Notes whether an operation's result is needed by the host."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= func._schema.name in WAITS
        return func(*args, **kwargs or {})


def run_and_look_for_waits(forward, device):
    """Take the place of `bstack.engine.graphs.run_and_look_for_waits`."""
    with Waits() as waits:
        return forward(), waits.found


class Graph(TorchDispatchMode):
    """A recording, of kernels that `launcher` launches, too."""

    active = None

    def __init__(self, launcher=None):
        super().__init__()
        self.calls, self.replays = [], 0
        self._kernels = launcher and launcher.kernels
        self._before = []

    def __enter__(self):
        if self._kernels:
            self._launch = self._kernels.launch
            self._kernels.launch = lambda *arguments: self.calls.append((self._launch, arguments, {}, None))
        Graph.active = self
        return super().__enter__()

    def __exit__(self, *error):
        found = super().__exit__(*error)
        Graph.active = None
        if self._kernels:
            self._kernels.launch = self._launch
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in WAITS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self._before += [(one, one.clone()) for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, found))
        return found

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, found in self.calls:
                again = func(*args, **kwargs)
                for one, other in zip(tree_leaves(found), tree_leaves(again), strict=True):
                    if isinstance(one, torch.Tensor) and one.data_ptr() != other.data_ptr():
                        one.copy_(other)


def recorder(graphs, launcher=None):
    """Return what takes the place of `bstack.engine.graphs.record`, and notes its graphs."""

    def record(forward, device, *, warm=True):
        graphs.append(Graph(launcher))
        with graphs[-1]:
            result = forward()
        return graphs[-1], result

    return record


class Torch:
    """What torch keeps of recordings in a process: its stream, open pools of memory, and whether random numbers are recorded.

    A recording that fails leaves all of it as it is.
    """

    def __init__(self, monkeypatch):
        self.stream, self.pools, self.random = "own", set(), "plain"
        generator = SimpleNamespace(clone_state=lambda: self.random, graphsafe_set_state=self._set_random)
        found = {
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": self._in_stream,
            "CUDAGraph": object,
            "graph_pool_handle": lambda: (0, 1),
            "graph": self._recording,
            "default_generators": [generator],
        }
        for name, value in found.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.pools.remove(pool), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)

    def _set_random(self, state):
        self.random = state

    @contextmanager
    def _in_stream(self, stream):
        before = self.stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _recording(self, graph, pool, stream, capture_error_mode):
        assert not self.pools
        before = self.stream, self.random
        self.stream, self.random = "recording", "recorded"
        self.pools.add(pool)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.stream, self.random = before
        self.pools.remove(pool)
