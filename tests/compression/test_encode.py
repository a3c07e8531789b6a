"""Where matrices are encoded must not show in what comes out."""

import numpy as np
import pytest
import torch

from bstack.codecs import CODECS
from bstack.compression.encode import WIDE, Matrix, Threads, encode, encode_arrays
from bstk.errors import BstkError


def arrays(rows=40, columns=24):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((100, columns)).astype(np.float32)
    return {
        "weight": rng.standard_normal((rows, columns)).astype(np.float32),
        "hessian": inputs.T @ inputs,
        "sensitivity": rng.random(rows).astype(np.float32),
    }


VALUES = {"name": "a", "tokens": 100, "transposed": False, "even": False}


def elsewhere(array, offset):
    """The same array, read-only, at an address that is no multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    moved = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    moved.flags.writeable = False
    return moved


@pytest.mark.parametrize("codec", ["trellis", "sign"])
@pytest.mark.parametrize("offset", [0, 4, 32])
def test_arrays_may_lie_anywhere(codec, offset):
    given = arrays()
    moved = {name: elsewhere(array, offset) for name, array in given.items()}
    assert encode_arrays(moved, VALUES, CODECS[codec](2)) == encode_arrays(given, VALUES, CODECS[codec](2))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("field", "words"), [("hessian", "2 of its 24 inputs"), ("sensitivity", "2 of its 40 gradients")]
)
def test_what_calibration_made_nan_is_told_by_name(codec, value, field, words):
    given = arrays()
    given[field][[3, 5]] = value
    with pytest.raises(BstkError, match=f"^model.layer: in calibration {words} become NaN or infinite"):
        encode_arrays(given, {**VALUES, "name": "model.layer"}, CODECS[codec]())


class Part:
    def __init__(self):
        self.names = []

    def add(self, payload, **fields):
        self.names.append((fields["name"], fields["level"]))


class Later:
    """Workers that do nothing until they are asked; notes how many matrices are in work."""

    device = torch.device("cpu")

    def __init__(self, max_pending):
        self._max_pending, self.waiting, self.most = max_pending, 0, 0

    def max_pending(self, inputs):
        return self._max_pending

    def submit(self, function, *arguments):
        self.waiting += 1
        self.most = max(self.most, self.waiting)

        class Task:
            def result(task):
                self.waiting -= 1
                return function(*arguments)

            def cancel(task):
                self.waiting -= 1

        return Task()


def matrices(count):
    tensors = {name: torch.from_numpy(array) for name, array in arrays().items()}
    for number in range(count):
        yield Matrix(**tensors, **{**VALUES, "name": str(number)})


@pytest.mark.parametrize("max_pending", [1, 2, 4])
def test_order_and_number_in_work(max_pending):
    workers, part, steps = Later(max_pending), Part(), []
    encode(matrices(6), CODECS["sign"](2), part, workers, lambda: steps.append(1))
    assert part.names == [(str(number), level) for number in range(6) for level in range(2)]
    assert workers.most == max_pending and len(steps) == 6


def test_what_is_not_needed_any_more_is_cancelled():
    def failing():
        yield from matrices(2)
        raise KeyboardInterrupt

    workers = Later(4)
    with pytest.raises(KeyboardInterrupt):
        encode(failing(), CODECS["sign"](2), Part(), workers)
    assert workers.waiting == 0


def test_a_wide_matrix_is_alone_in_a_process():
    with Threads() as threads:
        assert threads.max_pending(WIDE + 1) == 1 <= threads.max_pending(WIDE) <= 4
