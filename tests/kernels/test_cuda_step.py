"""What a step computes between its products, on a GPU or compiled for the CPU, against torch in double precision."""

import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from torch.nn import functional

from bstack.kernels import cuda
from bstack.kernels.cuda.step import PAGE, Heads, Step, Texts
from bstack.numerics.rotation import rotate


def random(rng, *shape):
    return torch.randn(*shape, generator=rng)


def near(found, expected, tolerance=2e-5):
    return bool(((found.cpu().double() - expected).abs() <= tolerance * expected.abs().max()).all())


def placed(launcher, tensors):
    """Return tensors on the launcher's device, None as it is."""
    return [None if tensor is None else tensor.to(launcher.device) for tensor in tensors]


def normed(x, weight, epsilon=1e-6):
    x = x.double()
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


def step_of(launcher, **changes):
    heads = {"queries": 4, "keys": 2, "width": 12, "rotary": 12, "layers": 2, "epsilon": 1e-6, "scale": 0.3} | changes
    return Step(launcher.kernels, Heads(**heads))


@pytest.mark.parametrize("columns", [1, 48, 96, 576, 8192, 8192 + 64, 2 * 8192, 3 * 8192])
def test_norms_and_what_is_added(launcher, columns):
    rng = torch.Generator().manual_seed(columns)
    step, x, added = step_of(launcher), random(rng, 2, columns), random(rng, 2, columns)
    weights = [random(rng, columns) for _ in range(2)]
    for given in ((None, None, None), (None, None, weights[1]), (added, None, weights[1]), (added, *weights)):
        total, plain, rotated = step.prepare(*placed(launcher, (x, *given)))
        expected = x.double() + (0 if given[0] is None else normed(added, given[1]))
        assert near(total, expected) and near(plain, normed(expected, given[2]))
        assert near(rotated, rotate(normed(expected, given[2])))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations(launcher, activation):
    given = random(torch.Generator().manual_seed(0), 3, 2 * 80) * 3
    given[0, :4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    gate, up = given.double().chunk(2, 1)
    wanted = (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up
    plain, rotated = step_of(launcher).activated(given.to(launcher.device), activation)
    assert near(plain, wanted) and near(rotated, rotate(wanted))


CASES = [
    ({}, {}),
    ({"queries": 9, "keys": 3, "width": 64, "rotary": 64}, {}),  # of SmolLM2
    ({"queries": 7, "keys": 1, "width": 10, "rotary": 4}, {"norms": True, "window": 9}),
    ({"queries": 3, "keys": 3, "width": 130, "rotary": 130, "cap": 2.0}, {"window": 140}),
    ({"queries": 2, "keys": 1, "width": 256, "rotary": 128}, {"norms": True, "rope": -1}),
    ({"queries": 2, "keys": 2, "width": 80, "rotary": 80}, {"window": 1}),
    # So long that a part of a text has several stretches of 128 tokens.
    ({"queries": 2, "keys": 1, "width": 8, "rotary": 8, "scale": 3.0}, {"lengths": [2100, 4500]}),
    ({"queries": 1, "keys": 1, "width": 70, "rotary": 70}, {"lengths": [4500], "window": 4200}),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("backwards", [False, True])
def test_attention(launcher, shape, options, backwards):
    """Texts of several lengths, of which the last tokens are read one by one; pages lie anywhere."""
    launcher.backwards = backwards
    step = step_of(launcher, **shape)
    of, rng = step._heads, torch.Generator().manual_seed(1)
    lengths, layer, norms = options.get("lengths", [1, PAGE, 130, 300]), 1, [None, None]
    window, rope = options.get("window", 0), options.get("rope", 1)
    if options.get("norms"):
        norms = [random(rng, of.width) for _ in range(2)]
    pages, lists = [], []
    history = []
    for length in lengths:
        own = [
            torch.full((2, of.layers, of.keys, PAGE * of.width), torch.nan).half() for _ in range(-(-length // PAGE))
        ]
        past = random(rng, 2, of.keys, length - 1, of.width).half()
        for t in range(length - 1):
            page = own[t // PAGE]
            page[0, layer].view(of.keys, of.width, PAGE)[:, :, t % PAGE] = past[0, :, t]
            page[1, layer].view(of.keys, PAGE, of.width)[:, t % PAGE] = past[1, :, t]
        pages.append(own)
        history.append(past)
        pages[-1] = placed(launcher, own)
        lists.append(torch.tensor([page.data_ptr() for page in pages[-1]], device=launcher.device))
    table = torch.tensor([[length - 1, addresses.data_ptr()] for length, addresses in zip(lengths, lists, strict=True)])
    angles = random(rng, len(lengths), 2, of.rotary // 2).repeat(1, 1, 2)
    given = random(rng, len(lengths), (of.queries + 2 * of.keys) * of.width)
    texts = Texts(*placed(launcher, (table, angles.cos().contiguous(), angles.sin().contiguous())))
    query_norm, key_norm, placed_given = placed(launcher, (*norms, given))
    more = {"query_norm": query_norm, "key_norm": key_norm, "window": window, "rope": rope}
    plain, rotated = (found.cpu() for found in step.attend(placed_given, texts, layer, **more))
    for k, length in enumerate(lengths):
        query, key, value = given[k].view(-1, of.width).split([of.queries, of.keys, of.keys])
        query, key = normed(query, norms[0]), normed(key, norms[1])
        if rope >= 0:
            query, key = (turned(x, angles[k, rope].double()) for x in (query, key))
        page, at = pages[k][-1], (length - 1) % PAGE
        assert near(page[0, layer].view(of.keys, of.width, PAGE)[:, :, at], key, 1e-3)
        assert near(page[1, layer].view(of.keys, PAGE, of.width)[:, at], value.double(), 1e-3)
        keys, values = (
            torch.cat([past, new[:, None].half()], 1).double()
            for past, new in zip(history[k], (key, value), strict=True)
        )
        scores = torch.einsum("hgw,htw->hgt", query.view(of.keys, -1, of.width), keys) * of.scale
        scores = of.cap * torch.tanh(scores / of.cap) if of.cap else scores
        if window:
            scores[..., : max(0, length - window)] = -torch.inf
        wanted = torch.einsum("hgt,htw->hgw", scores.softmax(-1), values).reshape(-1)
        assert near(plain[k], wanted, 1e-4), length
    assert near(rotated, rotate(plain.double()), 1e-5)


def test_what_half_precision_does_not_hold(launcher):
    """Keys and values become the largest number; one that is none stays none."""
    step = step_of(launcher, queries=1, keys=1, width=8, rotary=0)
    page = torch.zeros(2, step._heads.layers, 1, PAGE * 8, device=launcher.device).half()
    addresses = torch.tensor([page.data_ptr()], device=launcher.device)
    given = torch.tensor([[1e6, -1e6, torch.inf, -torch.inf, torch.nan, 65504.0, -3.0, 0.0]]).repeat(1, 3)
    none, table = torch.zeros(1, 2, 0), torch.tensor([[0, addresses.data_ptr()]])
    given, table, none = placed(launcher, (given, table, none))
    step.attend(given, Texts(table, none, none), 1, rope=-1)
    wanted = torch.tensor([65504, -65504, 65504, -65504, torch.nan, 65504, -3, 0]).half()
    found = page[0, 1].cpu().view(8, PAGE)[:, 0], page[1, 1].cpu().view(PAGE, 8)[0]
    assert all(torch.equal(one.nan_to_num(7), wanted.nan_to_num(7)) for one in found)


def turned(x, angles):
    part, rest = x[:, : len(angles)], x[:, len(angles) :]
    low, high = part.chunk(2, -1)
    return torch.cat([part * angles.cos() + torch.cat([-high, low], -1) * angles.sin(), rest], -1)


def test_every_kernel_is_launched_here(launcher):
    launcher.launched.clear()
    for case in CASES[:2] + CASES[3:4]:
        test_attention(launcher, *case, False)
    test_norms_and_what_is_added(launcher, 48)
    test_activations(launcher, "silu")
    assert (
        {"prepare", "heads", "attend_1", "attend_4", "attended", "activated"} <= launcher.launched <= set(cuda.KERNELS)
    )


# What a kernel may get wrong, and the case of attention that shows it.
MUTANTS = {
    "no barrier after the weights": ("*= kept;\n        }\n        __syncthreads();", "*= kept;\n        }\n", 3),
    "weights of another largest score": ("total[g] = total[g] * kept + ", "total[g] = total[g] + ", 6),
    "a window that is one too wide": ("position - window + 1) : 0", "position - window) : 0", 5),
    "a page of a token before": ("min(page + 1, position / PAGE)", "page", 0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name):
    right, wrong, case = MUTANTS[name]
    assert cuda.source().count(right) == 1
    mutant = cuda_on_cpu.Launcher(cuda_on_cpu.build(cuda.source().replace(right, wrong)))
    with pytest.raises(AssertionError):
        for backwards in (False, True):
            test_attention(mutant, *CASES[case], backwards)


@pytest.mark.gpu
def test_the_benchmark_of_a_gpu():
    """Its figures need a GPU; that it runs does not."""
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    run = [sys.executable, script, "--rehearse", "--only", "step", "models"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n| ") == 9, done.stderr
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("Nothing is measured: torch finds no cuda:0 here")
