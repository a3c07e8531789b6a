"""Chat templates that never end, fill the memory or reach for what they must not: one documented error, soon."""

import subprocess
import sys
import time

import pytest
from test_embedded_files import SETTINGS, with_file
from transformers import AutoTokenizer

import bstack
from bstack.cli import main
from bstack.engine import chat_template as template
from bstack.errors import UnsupportedModelError

pytestmark = pytest.mark.slow

GOOD = [
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}\n",
    "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for i in range(99999) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}é\U0001f600",
    "{{ messages | tojson }}{% generation %}x{% endgeneration %}",
    "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ dict(a=1).a }}{{ '%s-%5d' % ('x', 3) }}{{ '-' * 8 }}{{ 2 ** 8 }}",
    "{{ '{}-{:>5}'.format('x', 3) }}{{ '%05d' | format(3) }}{{ 'x' | center(9) }}{{ [3, 1] | sort | join(',') }}{{ [{'a': 1}] | map(attribute='a') | list }}",
    "{% set x = 1 %}\n  {% generation %}\n{% set x = 2 %}{{ x }}\n {% endgeneration %}\n{{ x }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% if tools %}tools{% endif %}{% if documents is none %}none{% endif %}{{ unknown }}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}",
    "{%- set ns = namespace(self=1, found=false) %}{% set ns.found = true %}{{ ns.self }}{{ ns.found }}{{ dict.fromkeys('ab', 0) }}",
]
LOOP = "{% for i in range(99999) %}"
BAD = {
    "a long loop": ("{% for i in range(10**12) %}{% endfor %}", "too large"),
    "nested loops": (LOOP * 4 + "{% endfor %}" * 4, "more than 1 seconds"),
    "a number without end": ("{{ 10**(10**9) }}", "would be too large"),
    "a long string": ("{{ 'x' * 10**10 }}", "would be too large"),
    "a long list": ("{{ 10**10 * [1] }}", "would be too large"),
    "a padded string": ("{{ 'x'.ljust(10**10) }}", "too large"),
    "a string that doubles": (
        "{% set ns = namespace(s='x') %}" + LOOP + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "too large",
    ),
    "a wide field": ("{{ '%1000000000d' % 1 }}", "would be too large"),
    "a wide field from the arguments": ("{{ '%*d' % (10**9, 1) }}", "would be too large"),
    "a filter's width": ("{{ 'x' | center(600000000) | length }}", "too large"),
    "a filter's named width": ("{{ 'x' | indent(width=600000000, first=true) }}", "too large"),
    "a filter's rows": ("{{ [1] | batch(600000000, 'x') | list }}", "too large"),
    "a filter's field": ("{{ '%700000000d' | format(1) }}", "too large"),
    "a field of a method": ("{{ '{:>700000000}'.format(1) }}", "too large"),
    "a field of a mapping": ("{{ '{x:>700000000}'.format_map({'x': 1}) }}", "too large"),
    "a field of a method from the arguments": ("{{ '{:>{w}}'.format(1, w=7000) }}", "too large"),
    "a list that doubles": (
        "{% set ns = namespace(s=[1]) %}" + LOOP + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "too large",
    ),
    "a long text": (LOOP + "{{ 'x' * 100 }}{% endfor %}", "makes more than 4194"),
    "a long template": ("x" * (2**20 + 1), "has 1048577 characters"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "no template": ("{% for %}", "Expected"),
    "a refusal": ("{{ raise_exception('only with tools') }}", "only with tools"),
    "an attribute of a class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a global of a function": ("{{ strftime_now.__globals__.os }}", "unsafe"),
    "an attribute by filter": ("{{ (messages | attr('__class__')).x }}", "unsafe|undefined"),
    "a method by format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "a private name": ("{% set ns = namespace(__class__=1) %}", "cannot have the name"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "an import": ("{% import 'os' as os %}", "no loader"),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("text", GOOD)
def test_gives_what_transformers_gives(tokenizer, text):
    prompt = " é\u2028\U0001f600\x00{{ 1 + 1 }}\n"
    tokenizer.chat_template = text
    messages = [{"role": "user", "content": prompt}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = {"default": text, "tool_use": "other"}
    assert template.render(tokenizer, prompt) == wanted


def test_special_tokens_of_other_names(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, extra_special_tokens={"image_token": "<image>"})
    tokenizer.chat_template = "{{ image_token }}" + GOOD[0]
    assert template.render(tokenizer, "the river") == "<image><user>the river<assistant>"


@pytest.mark.parametrize("name", ["add_generation_prompt", "conversations", "tools", "messages"])
def test_special_tokens_cannot_take_the_names_of_other_values(tiny_llama, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, extra_special_tokens={name: ""})
    tokenizer.chat_template = GOOD[0]
    assert template.render(tokenizer, "the river") == "<user>the river<assistant>"


@pytest.mark.parametrize("case", BAD)
def test_ends_soon_and_says_why(tokenizer, case, monkeypatch):
    text, words = BAD[case]
    if "seconds" in words:  # the others have to end by themselves
        monkeypatch.setattr(template, "MAX_SECONDS", 1.0)
    tokenizer.chat_template = text
    started, trace = time.process_time(), sys.gettrace()
    with pytest.raises(
        UnsupportedModelError, match=f"the model's chat template fails: .*({words}).*without the template"
    ) as caught:
        template.render(tokenizer, "the river")
    assert "\n" not in str(caught.value) and time.process_time() - started < 10
    assert sys.gettrace() is trace


def test_needs_no_transformers():
    code = (
        "import sys; from bstack.engine.chat_template import render_messages\n"
        "print(render_messages('{{ a }}{{ messages[0].content }}', [{'role': 'user', 'content': 'b'}], {'a': 'a'}))\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "ab\nset()\n"
    )


def test_templates_of_no_kind(tokenizer):
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(UnsupportedModelError, match="chat template fails"):
        template.render(tokenizer, "the river")


def test_the_command(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template, "MAX_SECONDS", 1.0)
    bstack.compress(tiny_llama, "whole.bstk", settings=SETTINGS)
    for text, code in ((GOOD[0], 0), (BAD["nested loops"][0], 1)):
        with_file(tmp_path / "whole.bstk", "x.bstk", "chat_template.jinja", text.encode())
        with pytest.raises(SystemExit) as caught:
            main.main(["run", "x.bstk", "--chat", "-p", "the river", "--mb", "100", "--max-new-tokens", "4", "-q"])
        out, err = capsys.readouterr()
        assert (caught.value.code or 0) == code, err
        assert bool(out) == (code == 0) and ("chat template fails" in err) == (code != 0)
