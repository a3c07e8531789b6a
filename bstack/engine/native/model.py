"""A decoder in numpy and C: prompts in pieces, one token of each text in one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import accumulate
from typing import Any

import numpy as np

from bstack.engine.native.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture
from bstack.engine.native.sampling import Generation
from bstack.engine.native.sequence import PAGE, Sequence
from bstack.engine.native.weights import Packed, Plain, Weight, products
from bstack.kernels.decoder import MAX_PARTS, Decoder, Layer, Sizes, Text
from bstack.kernels.matrix import Matrix
from bstack.kernels.multiply import multiply_dense
from bstack.kernels.native import library
from bstack.packed.lock import PriorityLock
from bstack.packed.store import BlockStore

__all__ = ["NativeModel"]

# Tokens of a prompt that are read at a time, and the values that they may have between the layers.
PIECE, VALUES = 512, 2**22
# Tokens of a prompt that a server reads between two steps. Longer pieces are hardly faster, and other texts wait for them.
TURN = 128
# Tokens of a piece whose attention is computed together, over the keys up to the last of them, and scores that are held.
TOGETHER, SCORES = 64, 2**22


class NativeModel:
    """A decoder with packed weights.

    A sequence's results are the same bits whatever other sequences the model runs: a piece of a prompt is computed alone,
    and a step treats each text by itself. One thread at a time may call `read` and `step`; `bstack.resize` and
    `bstack.following` work meanwhile.

    Parameters
    ----------
    architecture : Architecture
    weights : mapping
        Every parameter by its name.
    lock : PriorityLock
        Held while blocks are read.
    store : BlockStore
        The blocks in memory.
    generation : Generation
        The model's own settings for writing text.
    """

    #: Tokens of a prompt that are worth reading while other texts wait.
    turn = TURN
    #: What makes and joins the arrays of prompts.
    _lib: Any = np

    def __init__(
        self,
        architecture: Architecture,
        weights: dict[str, Any],
        lock: PriorityLock,
        store: BlockStore,
        generation: Generation,
    ):
        self.architecture, self.generation = architecture, generation
        self.bstack_store = store
        self._lock = lock
        self._embedding: Weight = weights[EMBEDDING]
        self._head: Weight = weights[EMBEDDING if architecture.tied else HEAD]
        self._final_norm = self._norm_weight(weights[FINAL_NORM])
        self._layers = [self._layer(weights, number) for number in range(architecture.layers)]
        self._decoder = self._make_decoder()
        #: Tokens of a prompt that are read at a time.
        self.piece = max(PAGE, min(PIECE, VALUES // max(architecture.inner, architecture.width)))

    def sequence(self) -> Sequence:
        """Begin a text."""
        return Sequence(self.architecture)

    def read(self, sequence: Sequence, ids: Many[int], *, every: bool = False) -> np.ndarray:
        """Read the next tokens of a text.

        Parameters
        ----------
        sequence : Sequence
        ids : sequence of int
            At least one; a long prompt is read in pieces of `piece` tokens.
        every : bool
            Return the logits of every token.

        Returns
        -------
        np.ndarray
            The last token's logits, float32, shape (vocabulary,); with `every`, (tokens, vocabulary).

        Raises
        ------
        ValueError
            There is no token, one that the model does not have, or more than its context.
        """
        tokens = self._tokens(ids)
        sequence.reserve(len(tokens))
        found = []
        for start in range(0, len(tokens), self.piece):
            hidden = self._run_piece(sequence, tokens[start : start + self.piece])
            found.append(hidden if every else hidden[-1:])
        logits = self._logits(self._lib.concatenate(found) if every else found[-1])
        return logits if every else logits[0]

    def step(self, sequences: Many[Sequence], ids: Many[int]) -> np.ndarray:
        """Read one token of each of some texts, each once.

        Returns
        -------
        np.ndarray
            Their logits, float32, shape (texts, vocabulary).

        Raises
        ------
        ValueError
            As `read`, or a text is there twice.
        """
        tokens = self._tokens(ids)
        if len(tokens) != len(sequences) or len(set(map(id, sequences))) != len(sequences):
            raise ValueError(f"{len(tokens)} tokens for {len(sequences)} different texts.")
        for sequence in sequences:
            sequence.reserve(1)
        return self._step(sequences, tokens)

    def _step(self, sequences: Many[Sequence], tokens: np.ndarray) -> np.ndarray:
        if self._decoder is None:
            return np.stack(
                [self._logits(self._run_piece(*pair))[0] for pair in zip(sequences, tokens[:, None], strict=True)]
            )
        x = self._embed(tokens)
        cosine, sine = self._rotary_rows(np.array([sequence.length for sequence in sequences]))
        texts = (Text * len(sequences))(
            *(sequence.texts(cosine[k : k + 1], sine[k : k + 1])[0] for k, sequence in enumerate(sequences))
        )
        with self._lock.acquire():
            out = self._decoder.run(x, texts)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)
        return self._capped(out) if self._decoder.has_head else self._logits(out)

    def _tokens(self, ids: Many[int]) -> np.ndarray:
        tokens = np.asarray(ids, np.int64)
        if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= self._embedding.rows:
            raise ValueError(f"tokens are from 0 to {self._embedding.rows - 1}, at least one.")
        return tokens

    def _rotary_rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cosine and sine, (positions, kinds of rotary positions, values), each position's side by side."""
        pairs = [rope.rows(positions) for rope in self.architecture.rotary]
        return np.stack([cosine for cosine, _ in pairs], 1), np.stack([sine for _, sine in pairs], 1)

    def _embed(self, tokens: np.ndarray) -> Any:
        return self._embedding.lookup(tokens) * np.float32(self.architecture.embedding_scale)

    def _logits(self, hidden: Any) -> np.ndarray:
        return self._capped(self._head.multiply(hidden))

    def _capped(self, logits: Any) -> Any:
        cap = self.architecture.final_cap
        return cap * self._lib.tanh(logits / cap) if cap else logits

    def _norm_weight(self, stored: Any) -> Any:
        return stored + np.float32(self.architecture.norm_offset)

    def _layer(self, weights: dict[str, Any], number: int) -> dict[str, Any]:
        """Return a layer's parameters by the names of `bstack.kernels.decoder.Layer`."""
        of = self.architecture
        layer = {name: weights[place] for name, (place, _) in of.layer(number).items()}
        return {name: self._norm_weight(value) if name.endswith("_norm") else value for name, value in layer.items()}

    def _make_decoder(self) -> Decoder | None:
        """Describe the model to the kernels; None where they are missing or a matrix is not packed."""
        kernels, of = library(), self.architecture
        if kernels is None:
            return None
        layers = []
        for number, layer in enumerate(self._layers):
            given: dict[str, Any] = dict.fromkeys(("key", "value", "gate", "up", "down"))
            for name, value in layer.items():
                if isinstance(value, list):
                    given[name] = [_only_part(weight) for weight in value]
                elif name == "router" and isinstance(value, Plain):
                    given[name] = value.dense()
                else:
                    given[name] = value if isinstance(value, np.ndarray) else _only_part(value)
                if given[name] is None or (isinstance(value, list) and None in given[name]):
                    return None
            layers.append(Layer(**given, window=of.windows[number], rope=of.ropes[number]))
        own = of.experts
        sizes = Sizes(
            of.width,
            of.inner,
            of.heads,
            of.key_heads,
            of.head_width,
            of.epsilon,
            of.scale,
            rotary=2 * len(of.rotary[0].frequencies),
            activation=of.activation,
            whole_norms=of.whole_norms,
            cap=of.cap,
            **({} if own is None else {"experts": own.count, "chosen": own.chosen, "expert_inner": own.inner}),
            normalised=own is not None and own.normalised,
        )
        head = self._head.parts if isinstance(self._head, Packed) and len(self._head.parts) <= MAX_PARTS else []
        return Decoder(kernels, sizes, layers, self._final_norm, head, PAGE)

    def _run_piece(self, sequence: Any, tokens: np.ndarray) -> Any:
        """Read some tokens of a text; return their normalised hidden states."""
        sequence.reserve(len(tokens))
        x = self._embed(tokens)
        if self._decoder is None:
            x = self._run_layers(sequence, x)
        else:
            cosine, sine = self._rotary_rows(np.arange(sequence.length, sequence.length + len(tokens)))
            texts = (Text * len(tokens))(*sequence.texts(cosine, sine))
            scratch = self._decoder.scratch(len(tokens))
            for number in range(self.architecture.layers):
                with self._lock.acquire():
                    self._decoder.read(number, x, texts, scratch)
        sequence.tokens += tokens.tolist()
        return self._norm(x, self._final_norm)

    # What follows computes what csrc/decoder.c does, for the tokens of one text. A subclass has other arrays than numpy's.

    def _run_layers(self, sequence: Sequence, x: Any) -> Any:
        """Return the hidden states behind the last layer."""
        of = self.architecture
        rows = self._angles(np.arange(sequence.length, sequence.length + len(x)))
        cosine, sine = (part[:, :, None] for part in rows)  # the same for all heads
        shares = (of.heads, of.key_heads, of.key_heads)
        for number, layer in enumerate(self._layers):
            normal = self._norm(x, layer.get("input_norm"))
            query, key, value = self._project(layer, normal, ("query", "key", "value"), shares)
            query, key = self._norm_heads(query, layer.get("query_norm")), self._norm_heads(key, layer.get("key_norm"))
            if (rope := of.ropes[number]) >= 0:
                query, key = (self._turned(part, cosine[:, rope], sine[:, rope]) for part in (query, key))
            sequence.put(number, key, value.reshape(key.shape))
            (added,) = self._project(layer, self._attend(sequence, number, query), ("out",))
            x = x + self._norm(added, layer.get("attention_norm"))
            normal = self._norm(x, layer.get("post_norm"))
            if "router" in layer:
                added = self._run_experts(layer, normal)
            else:
                gate, up = self._project(layer, normal, ("gate", "up"), (1, 1))
                (added,) = self._project(layer, self._activated(gate, up), ("down",))
            x = x + self._norm(added, layer.get("feed_norm"))
        return x

    def _run_experts(self, layer: dict[str, Any], x: Any) -> Any:
        """Return what the experts that each token chose give, added up by how much each counts."""
        chosen, share = self._choose(*self._project(layer, x, ("router",)))
        added = self._lib.zeros_like(x)
        for number in np.unique(chosen).tolist():
            rows, which = np.nonzero(chosen == number)
            (both,) = self._multiply_all([layer["expert_gate"][number]], x[rows])
            inner = self._activated(*_split(both, (1, 1)))
            added[rows] += share[rows, which][:, None] * self._multiply_all([layer["expert_down"][number]], inner)[0]
        return added

    def _choose(self, logits: Any) -> tuple[np.ndarray, Any]:
        """Return which experts each token takes, and how much each of them counts, both (tokens, chosen)."""
        of = self.architecture.experts
        assert of is not None
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        chosen = np.argsort(-chances, 1, kind="stable")[:, : of.chosen]
        share = np.take_along_axis(chances, chosen, 1)
        return chosen, share / share.sum(1, keepdims=True) if of.normalised else share

    def _project(self, layer: dict[str, Any], x: Any, names: Many[str], shares: Many[int] = ()) -> list[Any]:
        """Return the products of several matrices with x, or the pieces of one that holds them all."""
        own = [name for name in names if name in layer]
        found = self._multiply_all([layer[name] for name in own], x)
        for k, name in enumerate(own):
            if (bias := layer.get(f"{name}_bias")) is not None:
                found[k] = found[k] + bias
        return found if len(own) == len(names) else _split(found[0], shares)

    def _multiply_all(self, weights: list[Any], x: Any) -> list[Any]:
        return products(weights, x)

    def _angles(self, positions: np.ndarray) -> tuple[Any, Any]:
        return self._rotary_rows(positions)

    def _turned(self, x: Any, cosine: Any, sine: Any) -> Any:
        """Rotate the first values of each head by its token's position, halves paired."""
        width = cosine.shape[-1]
        low, high, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
        turned = self._lib.concatenate([-high, low], -1) * sine
        return self._lib.concatenate([x[..., :width] * cosine + turned, rest], -1)

    def _activated(self, gate: Any, up: Any) -> Any:
        return _ACTIVATIONS[self.architecture.activation](gate) * up

    def _norm(self, x: Any, weight: Any) -> Any:
        if weight is None:
            return x
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.architecture.epsilon)) * weight

    def _norm_heads(self, x: Any, weight: Any) -> Any:
        """Return queries or keys as (tokens, heads, width), normalised as the model does."""
        of = self.architecture
        if of.whole_norms:
            x = self._norm(x, weight)
        x = x.reshape(len(x), -1, of.head_width)
        return x if of.whole_norms else self._norm(x, weight)

    def _attend(self, sequence: Sequence, number: int, query: Any) -> Any:
        """Return what the heads read of the text so far and of the tokens themselves, (tokens, heads x width)."""
        of = self.architecture
        tokens, start = len(query), sequence.length
        window = of.windows[number] or start + tokens
        first = max(0, start - window + 1)
        keys, values = sequence.get(number, first, start + tokens)
        columns = np.ascontiguousarray(values.swapaxes(1, 2))
        group = of.heads // of.key_heads
        query = query.reshape(tokens, of.key_heads, group, of.head_width)
        out = np.empty_like(query)
        step = min(TOGETHER, max(1, SCORES // (group * keys.shape[1])))
        for begin in range(0, tokens, step):
            own = np.arange(start + begin, start + min(begin + step, tokens))[:, None]
            seen = np.arange(first, own[-1, 0] + 1)
            hidden = (seen > own) | (seen <= own - window)
            for head in range(of.key_heads):
                part = query[begin : begin + step, head]
                scores = multiply_dense(keys[head, : len(seen)], part.reshape(-1, of.head_width))
                scores *= np.float32(of.scale)
                if of.cap:
                    scores = np.float32(of.cap) * np.tanh(scores / np.float32(of.cap))
                scores = scores.reshape(len(own), group, -1)
                np.copyto(scores, -np.inf, where=hidden[:, None])
                scores -= scores.max(-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(-1, keepdims=True)
                read = multiply_dense(columns[head, :, : len(seen)], scores.reshape(len(own) * group, -1))
                out[begin : begin + step, head] = read.reshape(part.shape)
        return out.reshape(tokens, -1)


def _only_part(weight: Weight) -> Matrix | None:
    """Return a packed matrix as the kernels take it, None for one that is plain or in parts."""
    return weight.parts[0] if isinstance(weight, Packed) and len(weight.parts) == 1 else None


def _split(x: Any, shares: Many[int]) -> list[Any]:
    """Return pieces of the columns of x, as large as the shares say."""
    ends = [x.shape[1] * end // sum(shares) for end in accumulate(shares)]
    return [x[:, start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}
