"""Recorded steps of transformers models, played on the CPU: the text of the model's own code, whatever it is recorded for."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import cuda_on_cpu
import pretend_graph
import pytest
import tiny_models
import torch
from transformers import DynamicCache, StoppingCriteria

import bstack
import bstk
from bstack.engine import graph_step
from bstack.engine import graphs as graphs_of_torch
from bstack.engine import load as loading
from bstack.errors import SlowerWarning
from bstack.models import kv_cache
from bstack.packed import backends
from bstack.packed.backends import CudaBackend
from bstack.packed.lock import PriorityLock

# One with learned positions and fused projections, one with windows, one with biases and a partial rotation, one with fewer heads of keys.
NAMES = ["gpt2", "gemma3", "gpt-neox", "falcon"]
IDS = torch.arange(3 * 9).view(3, 9) * 7919 % 200 + 3


@pytest.fixture(scope="module")
def models():
    """Random models of several architectures by name, made once."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, tiny_models.make(name).eval())


@pytest.fixture
def graphs(monkeypatch):
    """Let steps be recorded on the CPU, and note the recordings."""
    made = []
    monkeypatch.setattr(graph_step, "record", pretend_graph.recorder(made))
    monkeypatch.setattr(graph_step, "run_and_look_for_waits", pretend_graph.run_and_look_for_waits)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kv_cache, "MIN_FIXED", 16)
    return made


def install(model, graphs):
    why = graph_step.install(model, PriorityLock())
    assert (why is None) == ("forward" in vars(model))
    del graphs[:]
    return why


def text(model, ids, tokens, **options):
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **settings, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_that_of_the_models_own_code(name, models, graphs):
    """Of one text and of three with padding, beyond windows and the first size of the buffers; then in other ways."""
    model, mask = models(name), torch.ones_like(IDS)
    mask[0, :4] = 0

    def texts():
        return [
            text(model, IDS[:1], 32),
            text(model, IDS, 12, attention_mask=mask),
            text(model, IDS[:1], 8, num_beams=2),
            text(model, IDS[:1], 8, prompt_lookup_num_tokens=3),
            model.generate(IDS[:1, :1], do_sample=True, top_k=5, max_new_tokens=9, pad_token_id=0),
        ]

    torch.manual_seed(0)
    wanted = texts()
    assert install(model, graphs) is None
    torch.manual_seed(0)
    found = texts()
    del model.forward
    assert all(map(torch.equal, found, wanted))
    # 32 tokens need buffers of 18, 38 and 78, 12 the first two: in each the first step runs alone.
    assert [graph.replays for graph in graphs[:5]] == [8, 19, 1, 8, 1]


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_16_bits_agree_with_themselves(name, graphs):
    """Sums with transformers' own cache have another order, which shows in 16 bits."""
    assert install(tiny_models.make(name).eval().bfloat16(), graphs) is None


def test_a_conversation_goes_on_with_its_cache(models, graphs):
    model = models("gpt2")

    def turns():
        with torch.inference_mode():
            first = text(model, IDS[:1], 6, return_dict_in_generate=True)
        longer = torch.cat([first.sequences.clone(), IDS[1:2]], 1)
        return text(model, longer, 6, past_key_values=first.past_key_values)

    wanted = turns()
    assert install(model, graphs) is None
    found = turns()
    del model.forward
    assert torch.equal(found, wanted) and [graph.replays for graph in graphs] == [4, 4]


def test_texts_of_several_threads(models, graphs):
    """A thread that finds another in a step runs launch by launch."""
    model = models("gpt2")
    wanted = [text(model, IDS[row : row + 1], 12) for row in range(3)]
    assert install(model, graphs) is None
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda row: text(model, IDS[row : row + 1], 12), range(3)))
    del model.forward
    assert all(map(torch.equal, found, wanted))


def test_a_cache_that_is_emptied_or_cut(models, graphs):
    model = models("gpt2")

    def logits():
        cache, found = DynamicCache(config=model.config), []
        for gone in (3, None, 0):
            mask = torch.ones(1, 9 + cache.get_seq_length(), dtype=torch.int64)
            options = {"return_dict_in_generate": True, "output_logits": True, "past_key_values": cache}
            seen = torch.cat([torch.zeros(1, cache.get_seq_length(), dtype=torch.int64), IDS[:1]], 1)
            found += text(model, seen, 6, attention_mask=mask, **options).logits
            cache.reset() if gone is None else cache.crop(-gone)
        return torch.stack(found)

    wanted = logits()
    assert install(model, graphs) is None
    found = logits()
    del model.forward
    assert torch.allclose(found, wanted, atol=1e-4) and graphs


def test_calls_of_forward_with_a_mask(models, graphs):
    """Without positions, which the model would count in Python, none is recorded; a full buffer is no step, either."""
    model, mask = models("gpt2"), torch.zeros(1, 1, 1, 16)
    assert install(model, graphs) is None

    @torch.no_grad()
    def step(place, **more):
        return model(IDS[:1, :1], attention_mask=mask, **{kv_cache.cache_argument(model): cache}, **more).logits

    cache = DynamicCache(config=model.config)
    model(IDS[:1, :4], **{kv_cache.cache_argument(model): cache})
    for place in range(4, 8):
        mask[..., place + 1 :] = -torch.inf
        step(place)
    assert not graphs
    mask[:] = 0
    for place in range(8, 16):
        step(place, position_ids=torch.tensor([[place]]))
    assert [graph.replays for graph in graphs] == [7]
    with pytest.raises((RuntimeError, IndexError)):
        step(16, position_ids=torch.tensor([[16]]))
    assert [graph.replays for graph in graphs] == [7]
    del model.forward


@pytest.mark.parametrize("seen", [True, False])
def test_a_step_that_waits_for_the_device_runs_launch_by_launch(seen, graphs, monkeypatch):
    """It is not recorded at all where the wait is seen before."""
    model = tiny_models.make("gpt2").eval()
    wanted = text(model, IDS[:1], 6)
    block = model.transformer.h[0].mlp
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda x: own(x) if x.sum().item() < 1e9 else None)
    reason = "their code waits for the GPU"
    if not seen:
        monkeypatch.setattr(graph_step, "run_and_look_for_waits", graphs_of_torch.run_and_look_for_waits)
        reason = "CUDA error: operation not permitted when stream is capturing"
    with pytest.warns(SlowerWarning, match=f"launched kernel by kernel, slowly: they cannot be recorded .{reason}"):
        why = graph_step.install(model, PriorityLock())
    assert why == f"its steps cannot be recorded ({reason})" and bool(graphs) != seen
    del graphs[:]
    assert torch.equal(text(model, IDS[:1], 6), wanted) and not graphs


def test_a_recording_that_fails_leaves_torch_as_it_was(monkeypatch):
    cuda = pretend_graph.Torch(monkeypatch)
    cpu = torch.device("cpu")
    for error in (RuntimeError("operation not permitted"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            graphs_of_torch.record(lambda error=error: raise_(error), cpu, warm=False)
        assert (cuda.stream, cuda.random, cuda.pools) == ("own", "plain", set())
    assert graphs_of_torch.record(lambda: 5, cpu)[1] == 5


def test_waits_of_the_own_thread_are_seen(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return 7

    def elsewhere():
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(wait).result()

    found = [graphs_of_torch.run_and_look_for_waits(one, torch.device("cuda")) for one in (wait, elsewhere)]
    assert found == [(7, True), (7, False)] and modes == ["warn", 0] * 2


def raise_(error):
    raise error


def test_a_step_that_depends_on_numbers_of_python_is_found_out(graphs, monkeypatch):
    model = tiny_models.make("gpt2").eval()
    own = model.transformer.forward

    def counting(*args, **kwargs):
        found = own(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state + kwargs[kv_cache.cache_argument(model)].get_seq_length()
        return found

    monkeypatch.setattr(model.transformer, "forward", counting)
    with pytest.warns(SlowerWarning, match="do not give GPT2LMHeadModel's results"):
        assert install(model, graphs) == "recorded, it gives other results"


class Resize(StoppingCriteria):
    """Changes a model's size after some tokens."""

    def __init__(self, model, sizes):
        self.model, self.sizes, self.calls = model, sizes, 0

    def __call__(self, ids, scores, **_):
        self.calls += 1
        if self.calls in self.sizes:
            bstack.resize(self.model, self.sizes[self.calls])
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """A file of a model of one layer with 67 words."""
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 67}
    settings = bstack.Settings(codec="trellis", planes=2, samples=2, sequence_length=16)
    folder = tmp_path_factory.mktemp("packed")
    bstack.compress(tiny_models.save("llama", folder / "model", **small), folder / "m.bstk", settings=settings)
    return folder / "m.bstk"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(packed_file):
    """The text is that of steps launch by launch, before and after a change of the size; a failed recording harms nothing."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    device, ids = torch.device("cuda", 0), IDS[:1, :6].cuda() % 67
    with pytest.raises(RuntimeError):
        graphs_of_torch.record(lambda: torch.ones(1, device=device).item(), device, warm=False)
    assert graphs_of_torch.run_and_look_for_waits(lambda: torch.ones(1, device=device).item(), device) == (1, True)
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and len(torch.randn(3, device=device)) == 3
    options = {"mode": "packed", "device": "cuda", "dtype": torch.float32}
    model, plain = (bstack.load(packed_file, fused=fused, **options)[0] for fused in (True, False))
    assert model.bstack_unfused is None
    with bstk.open(packed_file) as file:
        small = (file.base.budget + 1) / bstk.MB
    for mb in (None, small, None):
        for one in (model, plain):
            bstack.resize(one, mb)
        assert torch.equal(text(model, ids, 40), text(plain, ids, 40))


def test_a_resize_needs_no_new_recording(graphs, packed_file, monkeypatch):
    """Packed weights with the kernels of a GPU: smaller and larger again while the text is written."""
    launcher, cpu, ids = cuda_on_cpu.launcher(), torch.device("cpu"), IDS[:1, :6] % 67
    monkeypatch.setattr(graph_step, "record", pretend_graph.recorder(graphs, launcher))
    monkeypatch.setattr(backends, "is_recording", lambda device: pretend_graph.Graph.active is not None)
    monkeypatch.setattr(loading, "device_of", lambda *_: cpu)
    monkeypatch.setattr(loading, "backend_of", lambda _, count: CudaBackend(cpu, count, launcher.kernels))
    model, _ = bstack.load(packed_file, mode="packed", device="cuda")
    assert model.bstack_unfused is None
    with bstk.open(packed_file) as file:
        sizes = {3: (file.base.budget + 1) / bstk.MB, 5: None}
    del graphs[:]
    found = [text(model, ids, 7, stopping_criteria=[Resize(model, own)]) for own in (sizes, {})]
    assert [graph.replays for graph in graphs] == [5, 5] and not torch.equal(*found)
    with pytest.raises(IndexError, match="out of range: 67"):
        model.get_input_embeddings()(torch.tensor([[67]]))
    monkeypatch.delattr(model, "forward")
    assert torch.equal(found[0], text(model, ids, 7, stopping_criteria=[Resize(model, sizes)]))
