"""Chat templates that never end, or fill the memory: one documented error, soon, and none of it in this process."""

import subprocess
import sys

import pytest
from test_embedded_files import SETTINGS, with_file
from transformers import AutoTokenizer

import bstack
from bstack.cli import main
from bstack.engine import chat_template as template
from bstack.errors import UnsupportedModelError

GOOD = [
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "{{ bos_token }}{{ messages[-1].content }}{{ eos_token }}\n",
    "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{% for i in range(99999) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}é\U0001f600",
    "{{ messages | tojson }}{% generation %}x{% endgeneration %}",
]
LOOP = "{% for i in range(99999) %}"
BAD = {
    "a long loop": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "nested loops": (LOOP * 4 + "{% endfor %}" * 4, "more than 1 seconds"),
    "a number without end": ("{{ 10**(10**9) }}", "more than 1 seconds"),
    "a long string": ("{{ 'x' * 10**10 }}", "more than 256 MB"),
    "a string that doubles": (
        "{% set ns = namespace(s='x') %}" + LOOP + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "more than 256 MB",
    ),
    "a wide field": ("{{ '%1000000000d' % 1 }}", "more than 256 MB"),
    "a long text": ("{{ 'x' * 10**7 }}", "makes 10000000 characters"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "no template": ("{% for %}", "Expected"),
    "a refusal": ("{{ raise_exception('only with tools') }}", "only with tools"),
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
def test_special_tokens_of_names_that_are_taken(tiny_llama, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, extra_special_tokens={name: ""})
    tokenizer.chat_template = GOOD[0]
    with pytest.raises(UnsupportedModelError, match=f"calls a special token '{name}'"):
        template.render(tokenizer, "the river")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
@pytest.mark.parametrize("case", BAD)
def test_ends_soon_and_says_why(tokenizer, case):
    text, words = BAD[case]
    tokenizer.chat_template = text
    with pytest.raises(
        UnsupportedModelError, match=f"the model's chat template fails: .*({words}).*Leave --chat out"
    ) as caught:
        template.render(tokenizer, "the river", seconds=1)
    assert "\n" not in str(caught.value)


def test_what_no_limit_ends_is_ended_from_outside(tokenizer, monkeypatch):
    monkeypatch.setattr(template, "WALL_SECONDS", 0.01)
    tokenizer.chat_template = GOOD[0]
    with pytest.raises(UnsupportedModelError, match="does not end within 0.01 seconds"):
        template.render(tokenizer, "the river")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
def test_a_process_that_is_ended_leaves_no_core():
    ask = "import resource as r; from bstack.engine import chat_template as template; {}; template._limit(9); print(r.getrlimit(r.RLIMIT_CORE)[0])"
    raised = "r.setrlimit(r.RLIMIT_CORE, (r.getrlimit(r.RLIMIT_CORE)[1],) * 2)"
    assert (
        subprocess.run([sys.executable, "-c", ask.format(raised)], capture_output=True, text=True, check=True).stdout
        == "0\n"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "it takes more than 10 seconds, or too much memory"),
        ("import sys; sys.exit('no such thing')", "ended with status 1: .*no such thing. Leave"),
        ("import os; os._exit(3)", "ended with status 3: it says nothing. Leave"),
    ],
)
def test_a_process_that_breaks_says_why(tokenizer, tmp_path, monkeypatch, code, words):
    if sys.platform == "win32" and "kill" in code:
        pytest.skip("no signals")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nif '-P' in sys.orig_argv: exec({code!r})")
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer.chat_template = GOOD[0]
    with pytest.raises(UnsupportedModelError, match=words):
        template.render(tokenizer, "the river")


def test_the_process_imports_from_where_this_one_does_and_not_from_the_folder_it_is_in(
    tokenizer, tmp_path, monkeypatch
):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(f"open({str(tmp_path / name / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "there"), *sys.path])
    tokenizer.chat_template = GOOD[0]
    template.render(tokenizer, "the river")
    assert not (tmp_path / "here" / "run").exists() and (tmp_path / "there" / "run").exists()


def test_templates_of_no_kind(tokenizer):
    tokenizer.chat_template = {"tool_use": "x"}
    with pytest.raises(UnsupportedModelError, match="chat template fails"):
        template.render(tokenizer, "the river")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_the_command(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(template.render, "__defaults__", (1,))
    bstack.compress(tiny_llama, "whole.bstk", settings=SETTINGS)
    for text, code in ((GOOD[0], 0), (BAD["nested loops"][0], 1)):
        with_file(tmp_path / "whole.bstk", "x.bstk", "chat_template.jinja", text.encode())
        with pytest.raises(SystemExit) as caught:
            main.main(["run", "x.bstk", "--chat", "-p", "the river", "--mb", "100", "--max-new-tokens", "4", "-q"])
        out, err = capsys.readouterr()
        assert (caught.value.code or 0) == code, err
        assert bool(out) == (code == 0) and ("chat template fails" in err) == (code != 0)
