"""Measure packed weights on an NVIDIA GPU beside products in half precision, in one run.

    python benchmarks/gpu.py [--file model.bstk] [--device cuda:0] [--only products step models]

1. Products of 1, 2 and 4 blocks (2, 4 and 8 bits per weight) and a product in half precision, each inside a CUDA graph that goes
   through matrices larger than the second-level cache. Beside the time stand the bytes, look-ups and operations a second, as a
   fraction of what a copy in the GPU's memory moves and of what a product of large matrices in half precision computes.
2. The other kernels of a step, and decoded rows, with the same two bounds.
3. Tokens a second, greedy and one text, and a prompt of 512: of the shape of Llama 3.1 8B with random blocks at 4 bits, and of
   `--file`. Beside them stands transformers in half precision, with its static cache, writing from a CUDA graph.

Without a GPU, `--rehearse` runs all of it with small shapes on the CPU: its times mean nothing.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bstk
from bstack.engine.graphs import record
from bstack.engine.native import device as native_device
from bstack.engine.native.families import describe
from bstack.engine.native.load import load
from bstack.engine.native.sampling import Generation, Sampling
from bstack.kernels.cuda.step import PAGE, Heads, Step, Texts
from bstack.kernels.matrix import ROTATED, TRELLIS5, block_bytes
from bstack.kernels.selftest import random_payload
from bstack.packed.backends import CudaBackend, backend_of, device_of
from bstack.packed.lock import PriorityLock

SHAPES = [(4096, 4096), (4096, 14336), (28672, 4096), (576, 576), (1536, 576)]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = {**LLAMA, "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


class Gpu:
    """What is measured on: a device, its kernels, and what it gives at best."""

    def __init__(self, device: torch.device, backend, repeats: int):
        self.device, self.backend, self.repeats = device, backend, repeats
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**12
        size = 2**31 if device.type == "cuda" else 2**16
        given = torch.zeros(size, dtype=torch.uint8, device=device)
        taken = torch.empty_like(given)
        self.bytes = 2 * size / self.seconds(lambda: taken.copy_(given))

        side = 8192 if device.type == "cuda" else 64
        a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
        self.operations = 2 * side**3 / self.seconds(lambda: a @ b)

    def seconds(self, call) -> float:
        """Of the fastest of some runs, each a replay of a graph."""
        if self.device.type != "cuda":
            best = float("inf")
            for _ in range(self.repeats):
                started = time.perf_counter()
                call()
                best = min(best, time.perf_counter() - started)
            return best
        graph, _ = record(call, self.device)
        times = []
        for _ in range(self.repeats + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times[1:])

    def line(self, name: str, seconds: float, size: float, operations: float, *rest: str) -> None:
        """Print a row: time, bytes and operations a second, and the fraction of the nearer bound."""
        part = max(size / self.bytes, operations / self.operations) / seconds
        rates = f"{size / seconds / 1e9:,.0f} | {operations / seconds / 1e12:,.2f} | {part:.0%}"
        print(f"| {name} | {seconds * 1e6:,.1f} | {rates} |{''.join(f' {cell} |' for cell in rest)}", flush=True)


def put(backend: CudaBackend, rows: int, columns: int, levels: int, payloads: dict) -> tuple:
    """Make a matrix of random blocks of its own memory; return it and the memory."""
    if (rows, columns) not in payloads:
        payload = random_payload(np.random.default_rng(0), rows, columns, TRELLIS5, 2)
        payloads[rows, columns] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(backend.device)
    blocks = [payloads[rows, columns].clone() for _ in range(levels)]
    matrix = backend.matrix(rows, columns, [TRELLIS5])
    for level, block in enumerate(blocks):
        matrix.put(level, TRELLIS5, 2, block.data_ptr())
    matrix.count = levels
    return matrix, blocks


def products(gpu: Gpu, shapes: list[tuple[int, int]]) -> None:
    print("\n## Products of one token (the fraction is of the nearer bound)\n")
    print("| matrix | us | GB/s | T operations/s | of the bound | G look-ups/s | half precision / it |")
    print("|---|---|---|---|---|---|---|")
    kernels = gpu.backend.kernels
    for rows, columns in shapes:
        x = torch.randn(1, columns, device=gpu.device)
        count = 2 + 2 * gpu.cache // (2 * rows * columns)
        dense = [torch.randn(rows, columns, device=gpu.device).half() for _ in range(count)]
        half = x.half()
        base = gpu.seconds(lambda half=half, dense=dense: [half @ weight.t() for weight in dense]) / count
        name, work = f"{rows} x {columns}", 2 * rows * columns
        gpu.line(f"{name}, half precision", base, work, work, "", "1.00")
        del dense
        for levels in (1, 2, 4):
            size = levels * block_bytes(rows, columns, TRELLIS5, 2)
            count = 2 + 2 * gpu.cache // size
            payloads: dict = {}
            made = [put(gpu.backend, rows, columns, levels, payloads) for _ in range(count)]
            out, rotated = torch.empty(1, rows, device=gpu.device), kernels.rotate(x)

            def run(made=made, out=out, rotated=rotated, x=x) -> None:
                for matrix, _ in made:
                    kernels.multiply(matrix, x, rotated, out)

            seconds = gpu.seconds(run) / count
            looked = f"{levels * rows * columns / seconds / 1e9:,.0f}"
            gpu.line(f"{name}, {levels} block(s)", seconds, size, levels * work, looked, f"{base / seconds:.2f}")


def step(gpu: Gpu, width: int, inner: int, length: int) -> None:
    """The kernels of a step beside the products, and rows that are decoded."""
    print(f"\n## The other kernels: width {width}, a text of {length} tokens\n")
    print("| kernel | us | GB/s | T operations/s | of the bound |\n|---|---|---|---|---|")
    side = 128 if width % 512 == 0 else 16
    heads = Heads(width // side, max(1, width // side // 4), side, side, 1, 1e-6, 1.0)
    kernels = Step(gpu.backend.kernels, heads)
    x, weight, both = (torch.randn(*shape, device=gpu.device) for shape in ((1, width), (width,), (1, 2 * inner)))
    gpu.line("norm and rotation", gpu.seconds(lambda: kernels.prepare(x, x, None, weight)), 4 * 6 * width, 20 * width)
    gpu.line("activation and rotation", gpu.seconds(lambda: kernels.activated(both, "silu")), 16 * inner, 20 * inner)
    shape = (2, 1, heads.keys, PAGE * heads.width)
    pages = [torch.zeros(shape, dtype=torch.float16, device=gpu.device) for _ in range(-(-length // PAGE))]
    listed = torch.tensor([page.data_ptr() for page in pages], device=gpu.device)
    table = torch.tensor([[length - 1, listed.data_ptr()]], device=gpu.device)
    angles = torch.zeros(1, 1, heads.width, device=gpu.device)
    given = torch.randn(1, (heads.queries + 2 * heads.keys) * heads.width, device=gpu.device)
    seconds = gpu.seconds(lambda: kernels.attend(given, Texts(table, angles, angles), 0))
    gpu.line("attention", seconds, 4 * length * heads.keys * heads.width, 4 * length * heads.queries * heads.width)
    matrix, _blocks = put(gpu.backend, inner, width, 2, {})
    index = torch.arange(inner, device=gpu.device)
    for dtype in (torch.bfloat16, torch.float32):
        run = partial(gpu.backend.kernels.decode, matrix, ROTATED, index, dtype)
        size = inner * width * dtype.itemsize + 2 * block_bytes(inner, width, TRELLIS5, 2)
        gpu.line(f"rows to {dtype}, 2 blocks", gpu.seconds(run), size, 4 * inner * width)
    many = 512 if gpu.device.type == "cuda" else 4
    rows = torch.randn(many, width, device=gpu.device).bfloat16()
    run = partial(gpu.backend.kernels.rotate, rows, torch.bfloat16)
    gpu.line(f"rotation of {many} rows", gpu.seconds(run), 4 * rows.numel(), rows.numel() * np.log2(width))


def random_model(gpu: Gpu, config: dict, levels: int):
    """A model of random blocks, `levels` of each matrix."""
    architecture = describe(config)
    shapes = architecture.shapes()
    matrices = sum(len(shape) == 2 for shape in shapes.values())
    backend = CudaBackend(gpu.device, matrices, gpu.backend.kernels)
    lock, kept, payloads, weights = PriorityLock(), [], {}, {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape, device=gpu.device)
            continue
        matrix, blocks = put(backend, *shape, levels, payloads)
        kept.append(blocks)
        weights[name] = backend.packed([matrix], lock)
    generation = Generation(frozenset(), (), Sampling())
    model = native_device.DeviceModel(backend, architecture, weights, lock, None, generation)
    model.kept = kept
    return model


def rates(model, prompt: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of a prompt and of those after it; the fastest of three runs, after one."""
    ids = np.random.default_rng(0).integers(model.architecture.vocabulary, size=prompt).tolist()
    found = []
    for _ in range(4):
        text = model.sequence()
        started = time.perf_counter()
        token = int(model.read(text, ids).argmax())
        first = time.perf_counter()
        for _ in range(tokens):
            token = int(model.step([text], [token])[0].argmax())
        found.append((first - started, time.perf_counter() - first))
    reading, writing = (min(times) for times in zip(*found[1:], strict=True))
    return prompt / reading, tokens / writing


def rates_in_half(gpu: Gpu, model, prompt: int, tokens: int) -> tuple[float, float]:
    """Return the same of transformers' own model, with its static cache and a graph that writes one token."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt + tokens + 2)
    ids = torch.arange(prompt, device=gpu.device)[None]
    token, position = torch.zeros_like(ids[:, :1]), torch.full_like(ids[:, :1], prompt)
    more = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}

    def write() -> torch.Tensor:
        token.copy_(model(token, position_ids=position, **more).logits.argmax(-1))
        position.add_(1)
        return token

    next_token, found = write, []
    for turn in range(4):
        cache.reset()
        position.fill_(prompt)
        started = time.perf_counter()
        int(model(ids, position_ids=ids, **more).logits.argmax())
        first = time.perf_counter()
        if turn == 0 and gpu.device.type == "cuda":
            next_token = record(write, gpu.device)[0].replay
        for _ in range(tokens if turn else 1):
            next_token()
        int(token)  # waits for the device
        found.append((first - started, time.perf_counter() - first))
    reading, writing = (min(times) for times in zip(*found[1:], strict=True))
    return prompt / reading, tokens / writing


def models(gpu: Gpu, arguments: argparse.Namespace) -> None:
    import bstack

    print(
        "\n## Models, one text, greedy: tokens a second, beside transformers in half precision (static cache, graph)\n"
    )
    print("| model | prompt | transformers | ratio | writing | transformers | ratio |\n|---|---|---|---|---|---|---|")
    prompt, tokens = (20, 3) if arguments.rehearse else (512, 128)
    config = TINY if arguments.rehearse else LLAMA

    def random_in_half():
        from transformers import AutoModelForCausalLM, LlamaConfig

        with torch.device(gpu.device):
            return AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float16).eval()

    cases = [("random blocks, 4 bits", lambda: random_model(gpu, config, 2), random_in_half)]
    if file := arguments.file:
        dense = {"device": gpu.device, "dtype": torch.float16}
        cases.append(
            (Path(file).name, lambda: load(file, device=str(gpu.device))[0], lambda: bstack.load(file, **dense)[0])
        )
    for name, make, make_in_half in cases:
        model = make()
        packed = rates(model, prompt, tokens)
        del model
        print(f"{name}: prompt {packed[0]:,.0f}, writing {packed[1]:,.0f}", file=sys.stderr)  # whatever comes
        try:
            dense_model = make_in_half()
            with torch.no_grad():
                half = rates_in_half(gpu, dense_model, prompt, tokens)
            cells = [f"{a:,.0f} | {b:,.0f} | {a / b:.2f}" for a, b in zip(packed, half, strict=True)]
        except RuntimeError as error:  # too large, or not recorded
            print(f"transformers in half precision: {error}", file=sys.stderr)
            cells = [f"{a:,.0f} | - | -" for a in packed]
        dense_model = None
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="a .bstk file, such as that of `make demo`")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", nargs="+", choices=["products", "step", "models"])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    arguments = parser.parse_args()
    count = 10_000  # matrices of the table
    if arguments.rehearse:
        sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
        import cuda_on_cpu

        gpu = Gpu(torch.device("cpu"), CudaBackend(torch.device("cpu"), count, cuda_on_cpu.launcher().kernels), 1)
    else:
        try:
            device = device_of(arguments.device, packed=True)
        except bstk.BstkError as error:
            print(f"Nothing is measured: {error}", file=sys.stderr)
            return error.exit_code
        backend = backend_of(device, count)
        if not hasattr(backend.kernels, "launch"):
            print("Nothing is measured: the kernels in CUDA are missing (pip install 'bstack[cuda]').", file=sys.stderr)
            return 1
        torch.cuda.set_device(device)  # events are those of the current one
        gpu = Gpu(device, backend, 20)
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(
        f"A copy moves {gpu.bytes / 1e9:,.0f} GB/s; products in half precision do {gpu.operations / 1e12:,.1f} T operations/s."
    )
    tiny = arguments.rehearse
    for name, run in (
        ("products", lambda: products(gpu, [(32, 48)] if tiny else SHAPES)),
        ("step", lambda: step(gpu, *(32, 48, 70) if tiny else (4096, 14336, 1024))),
        ("models", lambda: models(gpu, arguments)),
    ):
        if not arguments.only or name in arguments.only:
            run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
