"""Thoughts and calls of tools in an answer, whole and in every way that it can come in pieces."""

import asyncio
import json
import random
from types import SimpleNamespace

import pytest

from bstack.engine.native.sampling import Sampling
from bstack.serve.answers import Answer
from bstack.serve.requests import ApiError, Request, _forced, _messages, _sampling, _tools, read_chat
from bstack.serve.scheduler import Piece

CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'
ARGUMENTS = '{"city": "Köln"}'


def joined(parts):
    """Text by its field, and calls as (name, arguments)."""
    found = {"reasoning_content": "", "content": "", "calls": []}
    for part in parts:
        for field in ("reasoning_content", "content"):
            found[field] += part.get(field, "")
        found["calls"] += [
            (call["function"]["name"], call["function"]["arguments"]) for call in part.get("tool_calls", ())
        ]
    return tuple(found.values())


ANSWERS = [
    ("Hello <b>.", False, ("", "Hello <b>.", [])),
    ("<think>\nfirst\n</think>\n\nHello", False, ("first\n", "Hello", [])),
    ("first</think>\nHello", True, ("first", "Hello", [])),
    ("<think>never ends", False, ("never ends", "", [])),
    ("  \n<thin", False, ("", "  \n<thin", [])),
    ("a <think>b</think>", False, ("", "a <think>b</think>", [])),
    (f"<tool_call>\n{CALL}\n</tool_call>", False, ("", "", [("weather", ARGUMENTS)])),
    (f"I look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", False,
     ("", "I look.", [("weather", ARGUMENTS)] * 2)),
    (f"<think>x</think><tool_call>{CALL}</tool_call>", False, ("x", "", [("weather", ARGUMENTS)])),
    (CALL.replace("arguments", "parameters"), False, ("", "", [("weather", ARGUMENTS)])),
    (f" [{CALL}, {CALL}]", False, ("", "", [("weather", ARGUMENTS)] * 2)),
    (CALL.replace("weather", "other"), False, ("", CALL.replace("weather", "other"), [])),
    ("{no json", False, ("", "{no json", [])),
    ("[1, 2]", False, ("", "[1, 2]", [])),
    ("[]", False, ("", "[]", [])),
    ("<tool_call>{broken</tool_call> after", False, ("", "<tool_call>{broken</tool_call> after", [])),
    (f"<tool_call>{CALL}", False, ("", "", [("weather", ARGUMENTS)])),
    ("x <tool_cal", False, ("", "x <tool_cal", [])),
    (f"[TOOL_CALLS] [{CALL}, {CALL}]", False, ("", "", [("weather", ARGUMENTS)] * 2)),
    (f"I look.[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}", False,
     ("", "I look.", [("weather", ARGUMENTS)] * 2)),
    ("[TOOL_CALLS]other[ARGS]{}", False, ("", "[TOOL_CALLS]other[ARGS]{}", [])),
    (f"{CALL}; {CALL}", False, ("", "", [("weather", ARGUMENTS)] * 2)),
    (f"{CALL}; and", False, ("", f"{CALL}; and", [])),
    (f"See: {CALL}", False, ("", f"See: {CALL}", [])),
    ('{"name": "weather", "parameters": null}', False, ("", "", [("weather", "{}")])),
    ('{"name": "weather", "arguments": [1]}', False, ("", '{"name": "weather", "arguments": [1]}', [])),
    ('{"name": "weather", "arguments": {"a": NaN}}', False, ("", '{"name": "weather", "arguments": {"a": NaN}}', [])),
    ('{"name": ["weather"]}', False, ("", '{"name": ["weather"]}', [])),
    ('{"name": "weather", "arguments": {"a": "\\ud83d"}}', False, ("", "", [("weather", '{"a": "\\ud83d"}')])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "thinking", "expected"), ANSWERS)
def test_an_answer_in_pieces(text, thinking, expected):
    rng = random.Random(0)
    for trial in range(40):
        answer, parts, rest = Answer({"weather"}, thinking), [], text
        while rest:
            count = len(rest) if not trial else rng.randint(1, 1 if trial == 1 else 6)
            parts += answer.add(rest[:count])
            rest = rest[count:]
        parts += answer.add("", last=True)
        found = joined(parts)
        assert found[0] == expected[0] and found[2] == expected[2] and answer.called == bool(expected[2])
        assert found[1].strip() == expected[1].strip()


def test_text_is_passed_on_at_once():
    answer = Answer({"weather"})
    assert joined(answer.add("Hello ")) == ("", "Hello ", [])
    assert joined(answer.add("there <")) == ("", "there ", [])
    assert joined(answer.add("b")) == ("", "<b", [])
    assert joined(Answer().add(CALL)) == ("", CALL, [])  # nobody has named a tool
    for text in ("[a link](x", "[1, 2", '{"city": "Köln"', "{% if"):
        assert joined(Answer({"weather"}).add(text)) == ("", text, [])


def test_tools_and_calls_of_a_conversation():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    assert _tools({"tools": [tool]}) == [tool]
    assert _tools({"tools": [tool], "tool_choice": "none"}) is None is _tools({})
    for wrong in ({"tools": "x"}, {"tools": [{"type": "x"}]}):
        with pytest.raises(ApiError):
            _tools(wrong)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    said = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    said.append({"role": "tool", "content": "rain", "tool_call_id": "1"})
    first, second = _messages({"messages": said})
    assert first["tool_calls"][0]["function"]["arguments"] == json.loads(ARGUMENTS) and first["content"] == ""
    assert second["tool_call_id"] == "1"
    with pytest.raises(ApiError):
        _messages({"messages": [{"role": "assistant", "content": None}]})


def test_a_call_that_is_demanded():
    city = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"type": "string"}}}
    tools = [{"function": {"name": "weather", "parameters": city}}, {"function": {"name": "time"}}]
    assert _forced({}, tools) is None is _forced({"tool_choice": "auto"}, tools)
    every, one = _forced({"tool_choice": "required"}, tools), {"type": "function", "function": {"name": "weather"}}
    assert [call["properties"]["name"]["const"] for call in every["anyOf"]] == ["weather", "time"]
    named = _forced({"tool_choice": one}, tools)
    assert len(named["anyOf"]) == 1 and named["$defs"] == city["$defs"] and "$defs" in city
    other = {"type": "function", "function": {"name": "other"}}
    for choice in ("any", {}, other, {"type": "function"}, 5):
        with pytest.raises(ApiError):
            _forced({"tool_choice": choice}, tools)
    with pytest.raises(ApiError):
        _forced({"tool_choice": "required"}, [])
    with pytest.raises(ApiError):
        _forced({"tool_choice": "required"}, [{"function": {"name": "x", "parameters": {"items": {"$ref": "#"}}}}])


class Scripted:
    """A scheduler that writes what it is told to."""

    def __init__(self, *pieces):
        self.pieces = [Piece(piece) for piece in pieces] + [Piece("", end="stop")]
        self.tokenizer = SimpleNamespace(
            chat_template="{{ tools | tojson }}{{ messages | tojson }}",
            special_tokens={},
            encode=lambda text, special: self.seen.append(text) or [5, 6],
            decode=lambda ids, special=False: "",
            marks={},
        )
        self.model = SimpleNamespace(
            architecture=SimpleNamespace(vocabulary=10, context=100),
            generation=SimpleNamespace(sampling=Sampling(), said=frozenset()),
        )
        self.longest, self.seen, self.stopping, self.idle = 100, [], False, 0.0
        self.parallel, self.queue, self.failed = 8, 64, False
        self.tokenizer.token_bytes = None

    def job(self, ask, tell):
        return SimpleNamespace(ask=ask, tell=tell, new=1, cached=0, first_token=None)

    def submit(self, jobs):
        for job in jobs:
            for piece in self.pieces:
                job.tell(piece)

    def cancel(self, jobs):
        pass

    def stop(self):
        pass

    def touch(self):
        pass


def test_tools_that_the_template_does_not_take():
    scheduler = Scripted()
    scheduler.tokenizer.chat_template = "{{ messages | tojson }}"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert read_chat(body, "m", scheduler).tools == ()
    body["tools"] = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(ApiError, match="takes no tools"):
        read_chat(body, "m", scheduler)


def test_drawing_is_from_all_tokens_unless_somebody_says_otherwise():
    def read(said=(), **body):
        own = Sampling(top_k=20 if "top_k" in said else 50)
        found = _sampling(body, SimpleNamespace(sampling=own, said=frozenset(said)), 10)
        return found.do_sample, found.top_k

    assert read(temperature=1) == read(top_p=0.9) == (True, 0) and read(temperature=1, top_k=5) == (True, 5)
    assert read({"top_k"}, temperature=1) == (True, 20)
    assert not read()[0] and not read(top_p=1)[0] and not read(top_k=-1)[0] and not read(temperature=0, top_p=0.5)[0]


def test_health():
    pytest.importorskip("prometheus_client", reason="the server needs it")
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx", exc_type=Exception)
    from bstack.serve.app import build
    from bstack.serve.guard import Guard

    scheduler = Scripted()
    app = build(scheduler, SimpleNamespace(asleep=False), "m", Guard(None, ["testserver"], []))
    with testclient.TestClient(app) as client:
        assert client.get("/health").status_code == 200
        scheduler.failed = True
        answer = client.get("/health")
        assert answer.status_code == 503 and answer.json()["status"] == "failed"
        scheduler.pieces = [Piece("", end="stopping")]
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping"
        assert answer.headers["retry-after"]


def test_pings_while_an_answer_is_held_back(monkeypatch):
    app = pytest.importorskip("bstack.serve.app", reason="the server needs its packages", exc_type=ImportError)
    from bstack.serve.forms import Chat

    monkeypatch.setattr(app, "PING", 0.05)
    scheduler = Scripted()

    async def run():
        scheduler.submit = lambda jobs: None
        texts = app._Texts(scheduler, [None])

        async def write():
            for letter in CALL:
                texts.jobs[0].tell(Piece(letter))
                await asyncio.sleep(0.01)
            texts.jobs[0].tell(Piece("", end="stop"))

        writing = asyncio.ensure_future(write())
        asked = Request([None], True, False, tools=("weather",))
        events = [event async for event in app._events(texts, Chat(None, asked), {}, asked)]
        await writing
        return events

    events = asyncio.run(run())
    assert events.count(": ping\n\n") >= 3 and "weather" in events[-2] and "DONE" in events[-1]


def test_a_text_that_nobody_reads_ends(monkeypatch):
    app = pytest.importorskip("bstack.serve.app", reason="the server needs its packages", exc_type=ImportError)
    monkeypatch.setattr(app, "UNREAD", 10)
    scheduler, cancelled = Scripted(), []
    scheduler.submit, scheduler.cancel = (lambda jobs: None), cancelled.extend

    async def run():
        texts = app._Texts(scheduler, [None])
        for _ in range(12):
            if not cancelled:
                texts.jobs[0].tell(Piece("x"))
                await asyncio.sleep(0)
        assert cancelled == texts.jobs
        return [found[1].end async for found in texts.pieces()]

    assert asyncio.run(run()) == [None] * 10 + ["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_reaches_the_client(stream):
    pytest.importorskip("prometheus_client", reason="the server needs it")
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx", exc_type=Exception)
    from bstack.serve.app import build
    from bstack.serve.guard import Guard

    scheduler = Scripted("<think>I", " see</think>", "Well. <tool", f"_call>{CALL}</tool_call>")
    app = build(scheduler, SimpleNamespace(asleep=False), "m", Guard(None, ["testserver"], []))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "stream": stream}
    with testclient.TestClient(app) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and '"weather"' in scheduler.seen[0]
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [event["choices"][0]["delta"] for event in events]
        end = events[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        parts, end = [choice["message"]], choice["finish_reason"]
    parts = [{name: value for name, value in part.items() if value} for part in parts]
    assert joined(parts) == ("I see", "Well. ", [("weather", ARGUMENTS)]) and end == "tool_calls"
