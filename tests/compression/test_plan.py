"""What a compression says of its memory before it starts."""

import architectures
import pytest
import tiny_models

import bstack
from bstack.cli.compress import _plan_text
from bstack.compression.encode import Threads
from bstack.compression.plan import plan
from bstack.models.open import open_checkpoint
from bstack.models.skeleton import Skeleton
from bstack.progress import Plan
from bstk import MB


def test_it_is_said_once_before_the_work(tiny_llama, tmp_path):
    seen = []

    def progress(stage, steps):
        seen.append(stage)
        return bstack.progress.no_progress(stage, steps)

    settings = bstack.Settings(planes=1, samples=2, sequence_length=16)
    bstack.compress(tiny_llama, tmp_path / "out.bstk", settings=settings, progress=progress, on_plan=seen.append)
    assert [type(one) for one in seen[:3]] == [str, Plan, str] and sum(isinstance(one, Plan) for one in seen) == 1
    assert 100 * MB < seen[1].memory_bytes < seen[1].free_bytes


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"vocab_size": 200_000}, 2 * 4 * 200_000 * 48),  # two heads for the curve
        ({"num_hidden_layers": 40}, 0),  # layers come one at a time, and the whole model only to write its own text
    ],
)
def test_larger_models_take_what_is_held_at_once(tmp_path, changes, least):
    def memory(folder, **changes):
        skeleton = Skeleton(open_checkpoint(tiny_models.save("llama", tmp_path / folder, **changes)))
        settings = bstack.Settings(calibration="text.txt", samples=2, sequence_length=16)
        with Threads() as workers:
            return plan(skeleton, settings, workers).memory_bytes

    more = memory("large", **changes) - memory("small")
    assert least <= more + 8 * MB and more < least + 64 * MB


def test_layers_with_settings_of_their_own(tmp_path):
    architectures.make(architectures.tiny_config("gemma4_text")).save_pretrained(tmp_path)
    with Threads() as workers:
        found = plan(Skeleton(open_checkpoint(tmp_path)), bstack.Settings(samples=2, sequence_length=16), workers)
    assert found.memory_bytes > 0


def test_the_memory_of_a_gpu():
    expected = (
        "1.000 MB are free. The system may end the command. Of the GPU's memory: about 5.000 MB; 8.000 MB are free."
    )
    assert _plan_text(Plan(2 * MB, 1 * MB, 5 * MB, 8 * MB)).endswith(expected)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (None, "Needs about 2.000 MB of memory at its peak."),
        (3 * MB, "Needs about 2.000 MB of memory at its peak; 3.000 MB are free."),
        (
            1 * MB,
            "Warning: Needs about 2.000 MB of memory at its peak; 1.000 MB are free. The system may end the command.",
        ),
    ],
)
def test_too_little_memory_is_a_warning(free, expected):
    assert _plan_text(Plan(2 * MB, free)) == expected
