"""Write several texts at a time in one thread: one token of each in a step, and pieces of new prompts between the steps.

A text does not depend on what else runs: prompts are read in pieces that begin at fixed places, a piece that is found again has
the bits that reading it would give, and a step treats each text by itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bstack.engine.native.generate import Pieces, TextTokenizer
from bstack.engine.native.model import NativeModel
from bstack.engine.native.sampling import Sampler, Sampling
from bstack.engine.native.sequence import PAGE
from bstack.errors import DeviceError, one_line
from bstack.packed.store import store_of
from bstack.serve.answers import overlap
from bstack.serve.grammar import Grammar, Grammars
from bstack.serve.prefixes import Prefixes

__all__ = ["Ask", "Busy", "Chosen", "Job", "Piece", "Scheduler"]


class Busy(Exception):
    """The queue is full, or the server stops; `seconds` until another try is worth it."""

    def __init__(self, stopping: bool, seconds: int):
        super().__init__()
        self.stopping, self.seconds = stopping, seconds


@dataclass(frozen=True)
class Ask:
    """A text to write: tokens of the prompt, limits, and how many likely tokens beside each chosen one are told (None: none).

    `grammar` belongs to this text alone. `marks` are special tokens that stay in the text.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    top: int | None = None
    grammar: Grammar | None = None
    marks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Chosen:
    """A token, its log probability, and the likeliest ones with theirs."""

    token: int
    chance: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """The next part of a text. The last one says why it ends: "stop", "length", "stopping", or "error" with a message as its text."""

    text: str
    chosen: tuple[Chosen, ...] = ()
    end: str | None = None


@dataclass(eq=False)
class Job:
    """A text on its way. `tell` receives its pieces, in the scheduler's thread."""

    ask: Ask
    tell: Callable[[Piece], None]
    pages: int
    cached: int = 0
    new: int = 0
    first_token: float | None = None
    seconds: float = 0.0  # to its last token
    begun: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def begin(self, model: NativeModel, tokenizer: TextTokenizer) -> None:
        """Make what writing needs."""
        self.text = model.sequence()
        self.sampler = Sampler(self.ask.sampling, model.architecture.vocabulary, self.ask.ids, self.ask.seed)
        self.out = _Out(tokenizer, self.ask.stop, self.ask.marks)
        self.last = -1  # the token that the next step reads; none yet
        self.changes = -1  # of the model
        self.keys: list[bytes] = []  # of the pieces read so far (`Prefixes`)
        self.tail: list[int] = []

    def free(self) -> None:
        """Let go of all that takes memory; who reads the text may hold the job for long."""
        for name in ("text", "sampler", "out", "tail"):
            self.__dict__.pop(name, None)


class _Out:
    """The text of tokens up to the first stop string; what may be the beginning of one is held back."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], marks: frozenset[int] = frozenset()):
        self._pieces, self._stops = Pieces(tokenizer, marks), stops
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """Take a token; return the text that is certain, and whether it has ended."""
        return self._cut(self._pieces.add(token), last=False)

    def rest(self) -> str:
        """Return what was held back."""
        return self._cut(self._pieces.rest(), last=True)[0]

    def _cut(self, text: str, last: bool) -> tuple[str, bool]:
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        longest = 0 if last else max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False


class Scheduler:
    """Writes texts in a thread of its own.

    Parameters
    ----------
    model, tokenizer
        From `bstack.engine.native.load.load`.
    parallel : int
        Texts that run at a time.
    queue : int
        Texts that wait; more are refused.
    cache_bytes : int
        Of keys and values: those of running texts, for which room is kept up to their longest, and of kept prompts.
    log : callable
        Receives a line where no more texts can be written.
    """

    def __init__(
        self,
        model: NativeModel,
        tokenizer: TextTokenizer,
        *,
        parallel: int = 8,
        queue: int = 64,
        cache_bytes: int,
        log: Callable[[str], None] = lambda line: None,
    ):
        of = model.architecture
        self.page_bytes = 4 * of.layers * of.key_heads * PAGE * of.head_width
        self.page_count = max(1, cache_bytes // self.page_bytes)
        #: Most tokens of a text, with its prompt.
        self.longest = min(of.context, self.page_count * PAGE)
        self.model, self.tokenizer = model, tokenizer
        self.parallel, self.queue, self._log = parallel, queue, log
        self.prefixes = Prefixes()
        self.grammars = Grammars(tokenizer, of.vocabulary, model.generation.ends)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        #: Tokens of prompts that were read and that were found, tokens written, and texts by their end.
        self.read_tokens = self.found_tokens = self.new_tokens = 0
        self.ended: dict[str, int] = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        #: When a text last ran, in seconds of a monotonic clock.
        self.active = time.monotonic()
        self._piece = min(model.turn, model.piece // PAGE * PAGE)
        self._store = store_of(model)
        self._turn = 0
        self._stopping = self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="bstack-scheduler", daemon=True)
        self._thread.start()

    def job(self, ask: Ask, tell: Callable[[Piece], None]) -> Job:
        """Make a job, which `submit` takes."""
        return Job(ask, tell, -(-(len(ask.ids) + ask.max_new_tokens) // PAGE))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Write some texts, all or none; raise Busy."""
        with self._changed:
            if self._stopping or len(self.waiting) + len(jobs) > self.queue + self.parallel - len(self.running):
                raise Busy(self._stopping, 1 + len(self.waiting) // max(1, self.parallel))
            self.waiting.extend(jobs)
            self.active = time.monotonic()
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End texts before their next token; those that have ended stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)
                    self.ended["cancelled"] += 1
            self._changed.notify()

    def touch(self) -> None:
        """Count as used from now on, as a text that runs does."""
        self.active = time.monotonic()

    @property
    def idle(self) -> float:
        """Seconds since a text last ran; 0 while one runs."""
        return 0.0 if self.waiting or self.running else time.monotonic() - self.active

    @property
    def stopping(self) -> bool:
        """Whether texts are no longer taken."""
        return self._stopping

    @property
    def failed(self) -> bool:
        """Whether the thread has ended by itself."""
        return not (self._ending or self._thread.is_alive())

    def refuse(self) -> None:
        """Take no more texts; those that are there go on. Safe in a signal handler."""
        self._stopping = True

    def stop(self) -> None:
        """End all texts and the thread."""
        with self._changed:
            self._stopping = self._ending = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except DeviceError as error:
            self._log(f"No more texts are written: {one_line(error)}")
        finally:  # also when it fails: clients do not wait for nothing
            with self._changed:
                self._stopping = True
                left = [*self.waiting, *self.running]
                self.waiting.clear()
                self.running.clear()
            for job in left:
                job.free()
                self._tell(job, Piece("", end="stopping"))

    def _next(self) -> bool:
        """Wait for something to do and do the next of it; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self.running or self._ending)
            if self._ending:
                return False
            for job in [job for job in self.running if job.cancelled]:
                self.running.remove(job)
                self.ended["cancelled"] += 1
                job.free()
            self._admit()
        if self.running:
            self._work()
        return True

    def _admit(self) -> None:
        """Begin texts in their order, while there is room."""
        while self.waiting and len(self.running) < self.parallel:
            job = self.waiting[0]
            room = self.page_count - job.pages - sum(other.pages for other in self.running)
            if room < 0:
                return
            self.running.append(self.waiting.popleft())
            self._guarded([job], self._begin)
            self.prefixes.shrink(room)

    def _begin(self, jobs: list[Job]) -> None:
        (job,) = jobs
        job.begin(self.model, self.tokenizer)
        job.changes = self._store.changes
        job.keys = [self.prefixes.first(self._store.state.weight_bytes)]
        self._adopt(job)
        job.cached = job.text.length

    def _adopt(self, job: Job) -> None:
        """Go on with the pieces of the prompt that this text or another has read."""
        start = job.text.length
        for pages in self.prefixes.find(job.keys, job.ask.ids[start:], self._piece):
            job.text.adopt(job.ask.ids[job.text.length : job.text.length + self._piece], pages)
        self.found_tokens += job.text.length - start

    def _work(self) -> None:
        """Read a piece of one prompt, and one token of each text that is being written."""
        reading = [job for job in self.running if job.last < 0]
        if reading:
            self._turn += 1
            self._guarded([reading[self._turn % len(reading)]], self._read)
        if writing := [job for job in self.running if job.last >= 0]:
            self._guarded(writing, self._step)
        self.touch()

    def _guarded(self, jobs: list[Job], work: Callable[[list[Job]], None]) -> None:
        """Do work for some texts; when it fails they end, and the other texts and the thread go on."""
        try:
            work(jobs)
        except BaseException as error:  # panics of the tokenizers library are no Exceptions
            for job in jobs:
                if job in self.running:
                    self._end(job, Piece(one_line(error), end="error"))
            if isinstance(error, DeviceError):
                raise

    def _read(self, jobs: list[Job]) -> None:
        (job,) = jobs
        ids, store = job.ask.ids, self._store
        # What was read at several sizes, or while the size changed, is of no use to others.
        if shared := job.changes == store.changes and not job.changes % 2:
            self._adopt(job)
        start = job.text.length
        stop = min(start + self._piece, len(ids))
        logits = self.model.read(job.text, ids[start:stop])
        self.read_tokens += stop - start
        if not shared or job.changes != store.changes:
            job.changes = -1
        elif stop - start == self._piece:
            job.keys.append(self.prefixes.next(job.keys[-1], ids[start:stop]))
            self.prefixes.keep(job.keys, job.text.share(start, stop))
            self.prefixes.shrink(self.page_count - sum(other.pages for other in self.running))
        if stop == len(ids):
            self._choose(job, logits)

    def _step(self, jobs: list[Job]) -> None:
        logits = self.model.step([job.text for job in jobs], [job.last for job in jobs])
        for job, row in zip(jobs, logits, strict=True):
            self._guarded([job], lambda _, job=job, row=row: self._choose(job, row))  # type: ignore[misc]

    def _choose(self, job: Job, logits: np.ndarray) -> None:
        """Take the next token of a text, and tell what is certain of it."""
        own = self.model.generation
        grammar = job.ask.grammar
        token = job.sampler.choose(logits if grammar is None else grammar.allow(logits))
        whole = grammar is not None and grammar.take(token)
        chosen = () if job.ask.top is None else (_chances(logits, token, job.ask.top),)
        job.new += 1
        self.new_tokens += 1
        job.seconds = time.monotonic() - job.begun
        if job.first_token is None:
            job.first_token = job.seconds
        job.last = token
        end = None
        if token in own.ends:
            text, end, chosen = job.out.rest(), "stop", ()
        else:
            text, stopped = job.out.add(token)
            if stopped:
                end = "stop"
            elif self._own_stop(job, token):
                text, end = text + job.out.rest(), "stop"
            elif whole or job.new == job.ask.max_new_tokens:
                text, end = text + job.out.rest(), "stop" if whole else "length"
        piece = Piece(text, chosen, end)
        if end:
            self._end(job, piece)
        elif text or chosen:
            self._tell(job, piece)

    def _own_stop(self, job: Job, token: int) -> bool:
        """Return whether a string of the model's own settings ends the text."""
        stops = self.model.generation.stop
        job.tail = [*job.tail, token][-max((len(stop.encode()) for stop in stops), default=0) - 8 :]
        return bool(stops) and any(stop in self.tokenizer.decode(job.tail, special=True) for stop in stops)

    def _end(self, job: Job, piece: Piece) -> None:
        with self._changed:
            self.running.remove(job)
            self.ended[piece.end or "stop"] += 1
        job.free()
        self._tell(job, piece)

    def _tell(self, job: Job, piece: Piece) -> None:
        if not job.cancelled:
            job.tell(piece)


def _chances(logits: np.ndarray, token: int, top: int) -> Chosen:
    """Return the log probabilities of the model: of the chosen token and of the likeliest."""
    shifted = logits - logits.max()
    chances = shifted - np.log(np.exp(shifted).sum())
    top = min(top, len(chances))
    likeliest = np.argpartition(-chances, top - 1)[:top] if top else np.zeros(0, int)
    likeliest = likeliest[np.argsort(-chances[likeliest], kind="stable")]
    return Chosen(token, float(chances[token]), [(int(other), float(chances[other])) for other in likeliest])
