"""Several texts at a time: each as if it were alone."""

import queue
import random
import threading

import pytest

import bstack
import bstk
from bstack.engine.native.load import load
from bstack.engine.native.sampling import Sampling
from bstack.serve.prefixes import Prefixes
from bstack.serve.scheduler import Ask, Busy, Scheduler, _Out


@pytest.fixture(scope="module")
def native(served_model):
    return load(served_model)


@pytest.fixture
def scheduler(native):
    made = []

    def make(**options):
        made.append(Scheduler(*native, **{"cache_bytes": 2**24, **options}))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def submit(scheduler, *asks):
    told = [queue.Queue() for _ in asks]
    jobs = [scheduler.job(ask, one.put) for ask, one in zip(asks, told, strict=True)]
    scheduler.submit(jobs)
    return list(zip(jobs, told, strict=True))


def text(told):
    pieces = []
    while not pieces or pieces[-1].end is None:
        pieces.append(told.get(timeout=300))
    return "".join(piece.text for piece in pieces), pieces[-1].end


def asks(count, seed=0):
    """Prompts of many lengths, some with the same beginning, greedy and drawn."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 200) for _ in range(300)]
    for number in range(count):
        own = [rng.randrange(3, 200) for _ in range(rng.choice([1, 7, 8, 9, 130]))]
        ids = shared[: rng.choice([0, 128, 200, 300])] + own
        draw = Sampling(do_sample=number % 3 == 0, temperature=1.5)
        yield Ask(ids, rng.choice([1, 5, 40]), draw, seed=number)


def test_a_text_is_the_same_whatever_else_runs(scheduler):
    alone = scheduler(parallel=1)
    wanted = [text(submit(alone, ask)[0][1]) for ask in asks(24)]
    assert alone.found_tokens  # and whether its beginning was found
    cold = [text(submit(scheduler(parallel=1), ask)[0][1]) for ask in list(asks(24))[::4]]
    assert cold == wanted[::4]
    busy = scheduler(parallel=6)
    assert [text(told) for _, told in submit(busy, *asks(24))] == wanted
    small = scheduler(parallel=6, cache_bytes=6 * busy.page_bytes * 8)
    assert [text(told) for _, told in submit(small, *asks(24))] == wanted
    assert small.prefixes.pages <= small.page_count


def test_kept_prompts_are_those_of_the_size(scheduler, native, served_model):
    model, _ = native
    ask = Ask([(31 * number) % 190 + 5 for number in range(300)], 12, Sampling(), 0)
    one = scheduler()
    full = text(submit(one, ask)[0][1])
    with bstk.open(served_model) as file:
        model.bstack_store.resize(file.base.budget)
    try:
        ((job, told),) = submit(one, ask)
        small = text(told)
        assert job.cached == 0 and small == text(submit(scheduler(), ask)[0][1])
    finally:
        bstack.resize(model)
    ((job, told),) = submit(one, ask)
    assert text(told) == full and job.cached == 256


def test_the_queue(scheduler):
    one = scheduler(parallel=1, queue=2)
    long = Ask([5] * 10, 800, Sampling(bias={2: -100.0}), 0)
    jobs = submit(one, long, long, long)
    with pytest.raises(Busy) as busy:
        submit(one, long)
    assert busy.value.seconds >= 1 and not busy.value.stopping
    one.cancel([job for job, _ in jobs])
    submit(one, Ask([5], 1, Sampling(), 0))[0][1].get(timeout=300)
    assert one.ended["cancelled"] == 3
    one.refuse()
    with pytest.raises(Busy) as busy:
        submit(one, long)
    assert busy.value.stopping


def test_room_for_keys_and_values(scheduler, native):
    """No text begins without room for its longest, and one that could never begin is bounded."""
    one = scheduler(parallel=8, cache_bytes=0)
    assert one.longest == 64
    one = scheduler(parallel=8)
    one.page_count = 5
    jobs = submit(one, *[Ask([5] * 60, 100, Sampling(bias={2: -100.0}), 0)] * 4)
    for _, told in jobs:
        assert sum(job.pages for job in one.running) <= 5
        assert text(told)[1] == "length"


def test_a_fault_ends_one_text(scheduler, native, monkeypatch):
    model, _ = native
    one = scheduler()
    real = model.read
    monkeypatch.setattr(model, "read", lambda text, ids: real(text, ids) if ids[0] != 99 else 1 / 0)
    good, bad = submit(one, Ask([5, 6], 5, Sampling(), 0), Ask([99], 5, Sampling(), 0))
    assert text(bad[1]) == ("division by zero", "error") and text(good[1])[1] in ("length", "stop")
    assert not one.running and one.ended["error"] == 1


class Panic(BaseException):
    """As those of the tokenizers library."""


class Broken:
    """A grammar that fails at its third token."""

    def __init__(self, error):
        self.left, self.error = 3, error

    def allow(self, logits):
        self.left -= 1
        if not self.left:
            raise self.error
        return logits

    def take(self, token):
        return False


@pytest.mark.parametrize("error", [ValueError("no token fits"), Panic("no token fits"), MemoryError("no token fits")])
def test_a_fault_of_one_text_in_a_step(scheduler, error):
    one = scheduler()
    draw = Sampling(bias={2: -100.0})
    wanted = text(submit(one, Ask([5, 6], 20, draw, 0))[0][1])
    good, bad = submit(one, Ask([5, 6], 20, draw, 0), Ask([7], 20, draw, 0, grammar=Broken(error)))
    assert text(bad[1])[1] == "error" and text(good[1]) == wanted and not one.failed


def test_a_fault_at_the_beginning(scheduler, monkeypatch):
    one = scheduler()
    monkeypatch.setattr(one.model, "sequence", lambda: 1 / 0)
    assert text(submit(one, Ask([5], 5, Sampling(), 0))[0][1]) == ("division by zero", "error")
    monkeypatch.undo()
    assert text(submit(one, Ask([5], 5, Sampling(), 0))[0][1])[1] != "error"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_of_the_thread_is_told(scheduler, monkeypatch):
    one = scheduler(parallel=1)
    monkeypatch.setattr(one, "_work", lambda: 1 / 0)
    jobs = submit(one, *[Ask([5], 5, Sampling(), 0)] * 3)
    assert [text(told)[1] for _, told in jobs] == ["stopping"] * 3
    one._thread.join()
    assert one.failed and one.stopping
    with pytest.raises(Busy):
        submit(one, Ask([5], 5, Sampling(), 0))


def test_texts_that_have_ended_hold_nothing(scheduler):
    one = scheduler(parallel=1)
    long = Ask([5] * 10, 900, Sampling(bias={2: -100.0}), 0)
    jobs = submit(one, Ask([5], 3, Sampling(), 0), long, long)
    text(jobs[0][1])
    jobs[1][1].get(timeout=300)
    one.cancel([jobs[1][0]])
    jobs[2][1].get(timeout=300)
    one.stop()
    assert not [name for job, _ in jobs for name in ("text", "sampler", "out") if hasattr(job, name)]


def test_texts_of_one_prompt_read_it_once(scheduler):
    one = scheduler()
    ask = Ask([(31 * number) % 190 + 5 for number in range(600)], 3, Sampling(), 0)
    jobs = submit(one, *[ask] * 4)
    assert len({text(told) for _, told in jobs}) == 1
    assert one.read_tokens == 512 + 4 * 88 and one.found_tokens == 3 * 512 and jobs[0][0].cached == 0
    assert text(submit(scheduler(), ask)[0][1]) == text(submit(one, ask)[0][1])


def test_a_prompt_that_is_read_while_blocks_are_dropped_is_not_kept(scheduler, native, served_model, monkeypatch):
    """Not even where the memory of what was dropped goes back late."""
    store, ask = native[0].bstack_store, Ask([(31 * number) % 190 + 5 for number in range(300)], 3, Sampling(), 0)
    dropping, done, pop = threading.Event(), threading.Event(), store._arena.pop
    monkeypatch.setattr(store._arena, "pop", lambda count: (dropping.set(), done.wait(300), pop(count)))
    with bstk.open(served_model) as file:
        resize = threading.Thread(target=store.resize, args=(file.base.budget,))
    one = scheduler()
    resize.start()
    try:
        dropping.wait(300)
        text(submit(one, ask)[0][1])
    finally:
        done.set()
        resize.join()
        monkeypatch.undo()
        bstack.resize(native[0])
    wanted = text(submit(scheduler(), ask)[0][1])
    ((job, told),) = submit(one, ask)
    assert text(told) == wanted and job.cached == 0


def test_stopping_tells_every_text(scheduler):
    one = scheduler(parallel=1)
    jobs = submit(one, *[Ask([5] * 10, 900, Sampling(bias={2: -100.0}), 0)] * 3)
    one.stop()
    assert [text(told)[1] for _, told in jobs] == ["stopping"] * 3 and not one.failed


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids, special=False, kept=()):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("stops", "expected"),
    [((), "abcabcd."), (("cab",), "ab"), (("abcd",), "abc"), (("abcd.x", "d."), "abcabc"), (("d.x",), "abcabcd.")],
)
def test_stop_strings_are_never_told(stops, expected):
    out, found = _Out(Letters(), stops), ""
    for letter in "abcabcd.":
        piece, ended = out.add(ord(letter))
        found += piece
        assert expected.startswith(found)
        if ended:
            break
    else:
        found += out.rest()
    assert found == expected


def test_prefixes_that_were_used_last_stay():
    kept, ids = Prefixes(), list(range(100))
    keys = [Prefixes.first(1)]
    for start in range(0, 90, 10):
        keys.append(Prefixes.next(keys[-1], ids[start : start + 10]))
        kept.keep(keys, [start])

    def find(ids, size=1, known=0):
        begun = [Prefixes.first(size), *keys[1 : 1 + known]]
        return [pages[0] for pages in kept.find(begun, ids[10 * known :], 10)]

    assert find(ids) == list(range(0, 90, 10)) and len(find(ids[:90])) == 8  # one token is left to read
    assert find(ids, size=2) == [] and len(find([*ids[:35], 0, *ids[36:]])) == 3
    assert find(ids, known=2) == list(range(20, 90, 10))
    kept.shrink(4)
    assert find(ids) == list(range(0, 40, 10)) and kept.pages == 4


@pytest.fixture
def on_device(served_model, monkeypatch):
    """The model as for a GPU, with products of the CPU."""
    torch = pytest.importorskip("torch")
    from bstack.engine.native import device
    from bstack.packed.backends import CpuBackend

    monkeypatch.setattr(device, "device_of", lambda *_, **__: torch.device("cpu"))
    monkeypatch.setattr(device, "backend_of", lambda *_: CpuBackend())
    return load(served_model, device="cuda")


def test_texts_on_a_device(native, on_device):
    """Several at a time, with prompts that are found again: the texts of the CPU."""
    told = []
    for model in (native, on_device):
        scheduler = Scheduler(*model, cache_bytes=2**24)
        scheduler._piece = 128  # the same of both
        try:
            greedy = [Ask(ask.ids, min(ask.max_new_tokens, 12), Sampling(), 0) for ask in asks(9, seed=3)]
            told.append([text(one) for _, one in submit(scheduler, *greedy)])
            assert scheduler.found_tokens > 0
        finally:
            scheduler.stop()
    assert told[0] == told[1]


def test_a_device_that_is_lost_ends_the_thread(on_device, monkeypatch):
    """Each text says why, later ones are refused, and one line is for who runs the server."""
    lines = []
    scheduler = Scheduler(*on_device, cache_bytes=2**24, log=lines.append)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(on_device[0]), "_attend", fail)
    (_, first), (_, second) = submit(scheduler, *(Ask([5, 6], 4, Sampling(), 0) for _ in range(2)))
    ends = {text(one) for one in (first, second)}
    assert any(end == "error" and "cpu failed: CUDA error: an illegal" in said for said, end in ends)
    scheduler._thread.join(300)
    assert scheduler.failed and len(lines) == 1 and "No more texts are written: cpu failed" in lines[0]
    with pytest.raises(Busy):
        submit(scheduler, Ask([5], 1, Sampling(), 0))
