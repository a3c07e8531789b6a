"""The server, asked by OpenAI's own client."""

import json
import time
import urllib.request

import psutil
import pytest

from bstack.engine.native import generate
from bstack.engine.native.load import load

openai = pytest.importorskip("openai", reason="the client of OpenAI's API")

pytestmark = pytest.mark.slow
SAID = [{"role": "user", "content": "the river and the house"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def loaded(served_model):
    return load(served_model)


def written(loaded, messages, **options):
    """What `bstack run` and `chat` write."""
    model, tokenizer = loaded
    ids = generate.encode_prompt(tokenizer, messages, chat=True)
    return generate.write_text(model, tokenizer, ids, lambda _: None, **{"max_new_tokens": 20, **options}), ids


def ask(client, **options):
    if "chat_template_kwargs" in options:
        options["extra_body"] = {"chat_template_kwargs": options.pop("chat_template_kwargs")}
    given = {"model": "tiny", "messages": SAID, "max_tokens": 20, "temperature": 0, **options}
    return client.chat.completions.create(**given)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "bstack"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat(client, loaded):
    expected, ids = written(loaded, SAID)
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if expected.new_tokens == 20 else "stop")
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == expected.new_tokens
    assert ask(client, messages=[{"role": "user", "content": [{"type": "text", "text": SAID[0]["content"]}]}]).choices


def test_a_stream(client, loaded):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    expected, _ = written(loaded, SAID)
    assert text == expected.text and chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion(client, loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode("the river", special=True)
    expected = generate.write_text(model, tokenizer, ids, lambda _: None, max_new_tokens=16).text
    options = {"model": "tiny", "temperature": 0}
    answer = client.completions.create(prompt="the river", **options)
    assert answer.choices[0].text == expected and answer.usage.completion_tokens == 16
    assert client.completions.create(prompt=ids, **options).choices[0].text == expected
    several = client.completions.create(prompt=["the river", "the house", "the river"], n=2, **options)
    assert [choice.index for choice in several.choices] == list(range(6))
    assert several.choices[0].text == several.choices[5].text == expected != several.choices[2].text
    assert "".join(c.choices[0].text for c in client.completions.create(prompt=ids, stream=True, **options)) == expected


def test_stop_strings(client, loaded):
    whole = written(loaded, SAID)[0].text
    stop = whole[7:10]
    answer = ask(client, stop=[stop, "never written"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    stream = ask(client, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole[: whole.index(stop)]


def test_sampling(client):
    draw = {"temperature": 1.8, "max_tokens": 30}
    text = {seed: ask(client, seed=seed, **draw).choices[0].message.content for seed in (1, 2)}
    assert text[1] != text[2] and ask(client, seed=1, **draw).choices[0].message.content == text[1]
    several = ask(client, seed=1, n=3, **draw)
    assert [choice.message.content for choice in several.choices][:2] == [text[1], text[2]]
    own = ask(client, extra_body={"top_k": 1}, temperature=1).choices[0].message.content
    assert own == ask(client).choices[0].message.content
    biased = ask(client, logit_bias={"77": 100}, max_tokens=3, logprobs=True)
    assert len({entry.token for entry in biased.choices[0].logprobs.content}) == 1
    spread = ask(client, logit_bias={"77": 100, "78": 100, "79": 99}, presence_penalty=2, max_tokens=3, logprobs=True)
    assert len({entry.token for entry in spread.choices[0].logprobs.content}) == 3


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["river", "house"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


def test_a_schema(client):
    """Even a model of random weights keeps to it; drawn, several at a time, and beside texts without one."""
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    answer = ask(client, response_format=form, max_tokens=200, temperature=1.5, seed=3, n=4)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1 and {choice.finish_reason for choice in answer.choices} == {"stop"}
    for text in texts:
        found = json.loads(text)
        assert list(found) == list(SCHEMA["required"]) and len(found["name"]) <= 12
        assert found["kind"] in ("river", "house") and all(0 <= size <= 99 for size in found["sizes"][:4])
    alone = ask(client, response_format=form, max_tokens=200, temperature=1.5, seed=4).choices[0].message.content
    assert alone == texts[1]
    greedy = ask(client, response_format={"type": "json_object"}, max_tokens=30).choices[0].message.content
    assert greedy.startswith("{")


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": fields,
     "required": [*fields], "additionalProperties": False}}}
    for name, fields in (("weather", {"city": {"enum": ["Rome", "Oslo"]}}), ("time", {"zone": {"enum": [1, 2]}}))
]  # fmt: skip


def called(client, stream, **options):
    """The calls of an answer, its text, and how it ends."""
    answer = ask(client, tools=TOOLS, stream=stream, **{"max_tokens": 60, **options})
    if not stream:
        (choice,) = answer.choices
        calls = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        return calls, choice.message.content, choice.finish_reason
    calls, text, end = {}, "", None
    for chunk in answer:
        (choice,) = chunk.choices
        text, end = text + (choice.delta.content or ""), choice.finish_reason or end
        for call in choice.delta.tool_calls or ():
            known = calls.get(call.index, ("", "", ""))
            new = (call.id, call.function.name, call.function.arguments)
            calls[call.index] = tuple(old + (part or "") for old, part in zip(known, new, strict=True))
    return [calls[index] for index in sorted(calls)], text or None, end


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, stream):
    """A model of random weights calls what it has to, and its call and the tool's answer are read again."""
    ((name, function, arguments),), text, end = called(client, stream, tool_choice="required")
    assert function in ("weather", "time") and end == "tool_calls" and text is None
    for tool, field, values in (("weather", "city", ("Rome", "Oslo")), ("time", "zone", (1, 2))):
        choice = {"type": "function", "function": {"name": tool}}
        ((name, function, arguments),), _, _ = called(client, stream, tool_choice=choice, temperature=1.5, seed=1)
        assert function == tool and json.loads(arguments).keys() == {field} and json.loads(arguments)[field] in values
    call = {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
    said = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call]}]
    said.append({"role": "tool", "tool_call_id": name, "content": "12:00"})
    calls, text, end = called(client, stream, messages=said, logit_bias={"2": -100})
    assert text and not calls and end == "length"
    with pytest.raises(openai.BadRequestError, match="9 letters"):
        call["id"] = "call_0"
        called(client, stream, messages=said)


def test_bytes_of_tokens(client):
    """They join to the text, also where a letter has several tokens."""
    bias = {"0": -100, "1": -100, "2": -100}  # special tokens are not in the text
    for seed in range(3):
        options = {"temperature": 1.9, "seed": seed, "logit_bias": bias, "max_tokens": 40, "logprobs": True}
        (choice,) = ask(client, **options).choices
        raw = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert raw.decode(errors="replace").strip() == choice.message.content.strip()


def test_settings_of_the_template(client):
    """A prompt that begins the thoughts: all is thought, and a schema is held to after them alone."""
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    (choice,) = ask(client, extra_body=options, logit_bias={"2": -100}).choices
    assert choice.message.reasoning_content and not choice.message.content
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    (choice,) = ask(client, extra_body=options, response_format=form, max_tokens=200).choices
    if not getattr(choice.message, "reasoning_content", None):  # the tokenizer has no token that ends thoughts
        assert json.loads(choice.message.content)


def test_log_probabilities(client):
    content = ask(client, logprobs=True, top_logprobs=4, max_tokens=5).choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        chances = [other.logprob for other in entry.top_logprobs]
        assert len(chances) == 4 and chances == sorted(chances, reverse=True)
        assert entry.logprob == chances[0] <= 0 and entry.token == entry.top_logprobs[0].token
    found = client.completions.create(model="tiny", prompt="the river", logprobs=2, max_tokens=4, temperature=0)
    chances = found.choices[0].logprobs
    assert len(chances.tokens) == len(chances.token_logprobs) == len(chances.text_offset) == 4
    assert all(len(top) == 2 for top in chances.top_logprobs)


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"model": "gpt-none"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, None),
        ({"messages": [{"role": "user", "content": "the river " * 900}]}, 400, "messages"),
        ({"temperature": 5}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"n": 100}, 400, "n"),
        ({"stop": [""]}, 400, "stop"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"7": 1000}}, 400, "logit_bias"),
        ({"top_logprobs": 50, "logprobs": True}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            400,
            "response_format",
        ),
        ({"tools": [{"type": "function", "function": {}}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"chat_template_kwargs": 5}, 400, "chat_template_kwargs"),
    ],
)
def test_mistakes(client, options, status, param):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **options)
    assert caught.value.status_code == status and caught.value.body["message"]
    assert param is None or caught.value.body["param"] == param


def test_fields_of_others_are_ignored(client):
    ask(client, user="me", extra_body={"min_tokens": 3, "cache_prompt": True, "metadata": {"a": 1}})


def metric(server, name):
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {tuple(s.labels.values()): s.value for f in families for s in f.samples if s.name == name}


def test_a_client_that_goes_ends_its_text(client, server):
    before = metric(server, "bstack_texts_total")[("cancelled",)]
    endless = {"max_tokens": 900, "logit_bias": {"2": -100}}

    def cancelled(count):
        return metric(server, "bstack_texts_total")[("cancelled",)] >= before + count

    deadline = time.monotonic() + 300
    while not cancelled(1):  # where this process waits, the text may have ended before
        with ask(client, stream=True, **endless) as stream:
            next(iter(stream))
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while not cancelled(9):  # or the time may have ended before the server had the request
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.05), n=8, **endless)
        assert time.monotonic() < deadline
        time.sleep(0.5)
    while metric(server, "bstack_texts_running")[()] > 0:
        assert time.monotonic() < deadline


def test_neither_torch_nor_transformers_is_loaded(client, server):
    ask(client)
    files = [mapped.path for mapped in psutil.Process(server.process.pid).memory_maps()]
    assert any("numpy" in file for file in files) and not [file for file in files if "torch" in file]


def test_metrics(client, server):
    written = metric(server, "bstack_tokens_total")[("written",)]
    ask(client, max_tokens=7)
    assert metric(server, "bstack_tokens_total")[("written",)] == written + 7
    assert metric(server, "bstack_http_responses_total")[("/v1/chat/completions", "200")] > 0
    assert metric(server, "bstack_first_token_seconds_count")[()] > 0


def test_a_prompt_is_found_again(client, server):
    """Another text with the same beginning reads what is new alone, and gets the same answer."""
    said = [{"role": "user", "content": "the old town " * 60}]
    first = ask(client, messages=said)
    again = ask(client, messages=said)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == (first.usage.prompt_tokens - 1) // 128 * 128 > 0
    assert first.choices[0].message.content == again.choices[0].message.content


def test_the_size(client, server):
    def size(wanted=None):
        data = None if wanted is None else json.dumps({"mb": wanted}).encode()
        with urllib.request.urlopen(f"{server.url}/v1/budget", data=data) as answer:
            return json.load(answer)

    def settled():
        deadline = time.monotonic() + 300
        while (now := size())["mb"] != now["target_mb"] or now["blocks"] not in (now["all_blocks"], small["blocks"]):
            assert time.monotonic() < deadline
        return now

    full = size()
    text = ask(client).choices[0].message.content
    small = size(full["min_mb"])
    assert small["blocks"] < full["blocks"] == full["all_blocks"]
    assert ask(client).choices[0].message.content != text
    with ask(client, max_tokens=500, stream=True) as stream:  # while a text runs
        for number, _ in enumerate(stream):
            if number == 5:
                size(full["max_mb"])
    assert settled()["blocks"] == full["blocks"] and ask(client).choices[0].message.content == text
    assert size("auto")["auto"] and not size(full["max_mb"])["auto"]
    for wrong in (0.001, "x", -1, True, None):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            size({} if wrong is None else wrong)
    with urllib.request.urlopen(f"{server.url}/v1/budget/events") as events:
        assert json.loads(events.readline().removeprefix(b"data: "))["blocks"] == full["blocks"]
