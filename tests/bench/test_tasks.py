"""Tasks through lm-eval: with a stand-in of its interface, and with the package itself where it is installed."""

import importlib.util
import json
import sys
import types

import pytest

import bstk
from bstack.bench.tasks import NEEDED, check_tasks, run_tasks
from bstk.errors import BstkError

RESULTS = {
    "results": {
        "plain": {"alias": "plain", "sample_len": 12, "acc_norm,none": 0.5, "acc,none": 0.25, "acc_stderr,none": 0.125},
        "written": {"alias": "written", "exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A"},
        "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "member": {"alias": " - member", "acc,none": 0.75, "acc_stderr,none": 0.2},
        "own": {"alias": "own", "brier,none": 3, "brier_stderr,none": 1},
    },
    "group_subtasks": {"group": ["member"], "plain": []},
}


@pytest.fixture
def harness(monkeypatch):
    """A stand-in of lm-eval; its `asked` lists the calls."""
    package = types.ModuleType("lm_eval")
    package.asked = []

    def simple_evaluate(*, model, tasks, bootstrap_iters):
        package.asked.append((model, tasks))
        if "bad" in tasks:
            raise ConnectionError("no data\nat all")
        return RESULTS

    package.simple_evaluate = simple_evaluate
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["plain", "group", "bad"])
    models, huggingface = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda **given: given
    for module in (package, tasks, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return package


def test_headlines_and_groups(harness):
    found = run_tasks("model", "tokenizer", ["plain", "group"])
    assert harness.asked == [({"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 1}, ["plain", "group"])]
    assert found == {
        "plain acc": (0.25, 0.125),
        "written exact_match": (1.0, None),
        "group acc": (0.5, 0.1),
        "own brier": (3.0, 1.0),
    }


def test_a_failure_of_the_harness_says_what_it_was(harness):
    with pytest.raises(bstk.BstkError, match=r"lm-eval failed on bad: ConnectionError: no data\. Data sets"):
        run_tasks("model", "tokenizer", ["bad"])


def test_unknown_tasks_are_refused(harness, tmp_path):
    with pytest.raises(bstk.UsageError, match="knows no task 'plane'"):
        check_tasks(["plain", "plane"])
    with pytest.raises(bstk.UsageError, match="There is no file"):
        check_tasks([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(BstkError, match=r"bstack\[tasks\]"):
        check_tasks(["plain"])


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDED), reason="lm-eval is not installed")
def test_a_task_of_ones_own_with_the_real_harness(tiny_llama, tmp_path, monkeypatch):
    """Four questions with three answers each; accuracy is that of plain log likelihoods."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    records = [
        {"question": f"word {n} then", "choices": [" one", " two of it", " three"], "answer": n % 3} for n in range(4)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: '{tmp_path / 'data.jsonl'}'}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    found = run_tasks(model.eval(), tokenizer, [str(tmp_path / "own.yaml")])
    assert list(found) == ["own acc"]
    import torch

    def likelihood(question, choice):
        start = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(tokenizer(question + choice, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return float(logits.gather(1, ids[1:, None])[start - 1 :].sum())

    right = [max(range(3), key=lambda i: likelihood(r["question"], r["choices"][i])) == r["answer"] for r in records]
    assert found["own acc"].value == sum(right) / 4
