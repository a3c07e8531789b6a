"""One call for a whole step: the same logits and texts as the model's own code, or the model's own code."""

import threading
import warnings

import pytest
import tiny_models
import torch
from cache_name import CACHE
from packed_models import IDS

import bstack
import bstk
from bstack.errors import SlowerWarning
from bstack.kernels.decoder import Decoder
from bstack.kernels.native import library
from bstack.models.kv_cache import growing_cache

pytestmark = pytest.mark.skipif(library() is None, reason="the C kernels are not built")

SLOW = pytest.mark.slow
FAMILY = ["llama", pytest.param("llama-tied", marks=SLOW), pytest.param("qwen2", marks=SLOW), "qwen3"]


def slowly(model):
    """The same model without the fast path."""
    del model.forward  # that of its class remains
    return model


def agree(packed, dense):
    """Logits: packed products round their inputs to 16 bits. Texts may differ with nothing wrong, where two words are as likely."""
    return bool((packed - dense).abs().max() <= 1e-3 * dense.std())


@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_those_of_the_models_own_code(name, file_of):
    fast, slow = (bstack.load(file_of(name), mode="packed")[0] for _ in range(2))
    slowly(slow)
    caches = [growing_cache(model) for model in (fast, slow)]
    with torch.no_grad():
        for model, cache in zip((fast, slow), caches, strict=True):
            model(IDS, **{CACHE: cache}, use_cache=True)
        for token in range(3, 80):  # beyond the first size of the cache
            word = torch.tensor([[token]])
            found, expected = (
                m(word, **{CACHE: c}, use_cache=True).logits for m, c in zip((fast, slow), caches, strict=True)
            )
            assert found.shape == expected.shape
            assert (found - expected).norm() <= 1e-2 * expected.norm()
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 82
        assert (ours.keys - theirs.keys).norm() <= 1e-2 * theirs.keys.norm()


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 2}, {"repetition_penalty": 1.3}, {"use_cache": False}],
)
def test_texts_are_those_of_the_models_own_code(name, options, file_of):
    texts = []
    for make in (lambda model: model, slowly):
        model = make(bstack.load(file_of(name), mode="packed")[0])
        torch.manual_seed(1)
        texts.append(
            model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, pad_token_id=0, **options)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_every_token_after_the_prompt_takes_the_fused_step(name, file_of, monkeypatch):
    """Under the name that transformers gives the cache, and under its old one."""
    model, _ = bstack.load(file_of("llama"), mode="packed")
    steps = []
    run = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: steps.append(1) or run(self, *args))
    with torch.no_grad():
        out = model(IDS, use_cache=True)
        for token in range(3, 8):
            out = model(torch.tensor([[token]]), **{name: getattr(out, CACHE)}, use_cache=True)
    assert len(steps) == 5
    steps.clear()
    model.generate(IDS, attention_mask=torch.ones_like(IDS), min_new_tokens=9, max_new_tokens=9, pad_token_id=0)
    assert len(steps) == 8


def test_batches_and_padding_take_the_models_own_code(file_of):
    model, slow = (bstack.load(file_of("llama"), mode="packed")[0] for _ in range(2))
    slowly(slow)
    dense, _ = bstack.load(file_of("llama"))
    ids = torch.tensor([[0, 0, 5, 9], [6, 7, 8, 9]])
    mask = (ids != 0).long()
    for rows in (2, 1):
        settings = {"attention_mask": mask[:rows], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        text = model.generate(ids[:rows], **settings)
        assert torch.equal(text, slow.generate(ids[:rows], **settings))
        whole = torch.cat([mask[:rows], torch.ones(rows, text.shape[1] - 4, dtype=torch.long)], 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found, expected = (m(text, attention_mask=whole, position_ids=positions).logits for m in (model, dense))
        assert agree(found[whole.bool()], expected[whole.bool()])


def test_what_is_asked_beyond_logits_is_answered(file_of):
    model, _ = bstack.load(file_of("llama"), mode="packed")
    cache = growing_cache(model)
    with torch.no_grad():
        model(IDS, **{CACHE: cache}, use_cache=True)
        out = model(IDS[:, :1], **{CACHE: cache}, use_cache=True, output_hidden_states=True, output_attentions=False)
        assert len(out.hidden_states) == 3
        pair = model(IDS[:, :1], **{CACHE: cache}, use_cache=True, return_dict=False)
        assert isinstance(pair, tuple)
        loss = model(IDS, labels=IDS).loss
    assert loss.isfinite()


@pytest.mark.parametrize(
    "name", ["mistral", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "phi3", "gemma2", "mixtral", "falcon"))]
)
def test_other_structures_keep_their_own_code(name, file_of):
    """Among them Mistral with a sliding window."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model, _ = bstack.load(file_of(name), mode="packed")
    assert "forward" not in vars(model)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] >= 6


@pytest.mark.parametrize("asked", [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_a_configuration_that_asks_for_more_keeps_the_models_own_code(asked, file_of, monkeypatch):
    """Without a warning: nothing is wrong with the results."""
    from bstack.engine import container

    def read_config(*args):
        config = original(*args)
        for name, value in asked.items():
            setattr(config, name, value)
        return config

    original = container.read_config
    monkeypatch.setattr(container, "read_config", read_config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model, _ = bstack.load(file_of("llama"), mode="packed")
    assert "forward" not in vars(model)
    if "return_dict" not in asked:  # transformers' own code fails where it is
        with torch.no_grad():
            out = model(IDS)
        assert all(name.removeprefix("output_") in out for name in asked)


def test_a_model_of_other_arithmetic_is_found_out(file_of, monkeypatch):
    """The structure of the family, but a multiplier that the kernels do not know."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.5 * forward(self, x))
    with pytest.warns(SlowerWarning, match="does not give LlamaForCausalLM's results"):
        model, _ = bstack.load(file_of("llama"), mode="packed")
    assert "forward" not in vars(model)


def test_without_kernels(file_of, monkeypatch):
    from bstack.engine import llama_step as fused

    monkeypatch.setattr(fused, "library", lambda: None)
    model, _ = bstack.load(file_of("llama"), mode="packed")
    assert "forward" not in vars(model)


def test_bfloat16(file_of):
    model, _ = bstack.load(file_of("llama"), mode="packed", dtype=torch.bfloat16)
    dense, _ = bstack.load(file_of("llama"))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        found, expected = model(IDS).logits, dense(IDS).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 0.1 * expected.norm()
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] >= 6


def test_budgets(file_of):
    path = file_of("llama")
    with bstk.open(path) as file:
        small = (file.base.budget + 1) / bstk.MB
    model, slow = (bstack.load(path, mode="packed", mb=small)[0] for _ in range(2))
    slowly(slow)
    dense, _ = bstack.load(path, mb=small)
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    text = model.generate(IDS, **settings)
    assert torch.equal(text, slow.generate(IDS, **settings))
    with torch.no_grad():
        found, expected = model(text).logits, dense(text).logits
    assert agree(found, expected) and found.shape[-1] == tiny_models.VOCABULARY


def test_two_texts_at_once(file_of):
    model, _ = bstack.load(file_of("llama"), mode="packed")
    prompts = [IDS, IDS.flip(1)]
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 210}
    alone = [model.generate(ids, **settings) for ids in prompts]
    found = [None, None]

    def write(which):
        found[which] = [model.generate(prompts[which], **settings) for _ in range(4)]

    threads = [threading.Thread(target=write, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(text, alone[which]) for which in (0, 1) for text in found[which])


def test_the_step_can_be_left_out(file_of):
    """Then hooks and changes of modules count after loading, too."""
    model, _ = bstack.load(file_of("llama"), mode="packed", fused=False)
    assert "forward" not in vars(model)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=210)
    assert len(calls) == 5


def test_hooks_before_loading_keep_the_models_own_code(file_of):
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        model, _ = bstack.load(file_of("llama"), mode="packed")
        assert "forward" not in vars(model)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[0].register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[1].mlp, "forward", lambda x: x),
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.Identity()),
        lambda model: setattr(model.model.layers[0].self_attn, "__class__", type("Mine", (torch.nn.Module,), {})),
        lambda model: setattr(model.config, "output_hidden_states", True),
    ],
)
def test_a_changed_model_is_not_given_the_step(change, file_of):
    from bstack.engine.llama_step import install

    model, _ = bstack.load(file_of("llama"), mode="packed", fused=False)
    lock = next(module.weight.packed.lock for name, module in model.named_modules() if name.endswith("q_proj"))
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert install(model, lock), "a reason"
    assert "forward" not in vars(model)


def test_another_type_or_configuration_after_loading_counts(file_of):
    model, _ = bstack.load(file_of("llama"), mode="packed")
    assert "forward" in vars(model)
    out = model(IDS, use_cache=True)
    model.config.output_hidden_states = True
    step = model(IDS[:, :1], **{CACHE: getattr(out, CACHE)}, use_cache=True)
    assert len(step.hidden_states) == 3


def test_a_cache_of_another_length_at_the_same_place(file_of, monkeypatch):
    """An allocator may give a new buffer the address of one that was freed."""
    fast, slow = (bstack.load(file_of("llama"), mode="packed")[0] for _ in range(2))
    slowly(slow)
    places = {}

    def buffer(new, old, used, capacity):
        shape = (*new.shape[:-2], capacity, new.shape[-1])
        count = torch.Size(shape).numel()
        place = places.setdefault(len(buffer.made) % (2 * len(fast.model.layers)), torch.zeros(2**16))
        buffer.made.append(shape)
        return place[:count].view(shape)

    buffer.made = []
    cache = growing_cache(fast)
    with torch.no_grad():
        for length in (10, 90):
            ids = torch.arange(length)[None] + 3
            with monkeypatch.context() as patch:
                patch.setattr("bstack.models.kv_cache._buffer", buffer)
                cache.reset()
                fast(ids, **{CACHE: cache}, use_cache=True)
                found = fast(IDS[:, :1], **{CACHE: cache}, use_cache=True).logits
            own = growing_cache(slow)
            slow(ids, **{CACHE: own}, use_cache=True)
            expected = slow(IDS[:, :1], **{CACHE: own}, use_cache=True).logits
            assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert len({shape[-2] for shape in buffer.made}) == 2 and len(places) == 2 * len(fast.model.layers)


@pytest.fixture
def steps(monkeypatch):
    """The positions of all tokens that went through the fused step."""
    from bstack.kernels.decoder import Decoder

    taken = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: taken.append(args[-1]) or step(self, *args))
    return taken


NEW = 9


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The file of a model without an end token, so that texts have the length that was asked for."""
    folder = tmp_path_factory.mktemp("endless")
    model = tiny_models.add_tokenizer(tiny_models.save("llama", folder / "model", eos_token_id=None))
    bstack.compress(model, folder / "model.bstk", settings=bstack.Settings(planes=2, samples=2, sequence_length=16))
    return folder / "model.bstk"


def run_command(path):
    from bstack.cli.run import command

    arguments = [str(path), "-p", "the river", "--max-new-tokens", str(NEW), "--engine", "transformers", "--json", "-q"]
    command.main(arguments, standalone_mode=False)


def bench_speed(path):
    from bstack.bench.speed import measure_speed

    model, _ = bstack.load(path, mode="packed")
    measure_speed(model)


def plain_generate(path):
    model, _ = bstack.load(path, mode="packed")
    model.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("way", [run_command, bench_speed, plain_generate])
def test_every_token_but_the_first_takes_the_step(way, endless, steps, monkeypatch, capsys):
    from bstack.bench import speed

    monkeypatch.setattr(speed, "_lengths", lambda context: (6, NEW - 1))
    at_loading = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way(endless)
    times = speed.REPETITIONS + 1 if way is bench_speed else 1
    assert len(steps) == at_loading + times * (NEW - 1)


def test_stop_strings_and_a_tokenizer_leave_the_step_in_place(file_of, steps):
    model, tokenizer = bstack.load(file_of("llama"), mode="packed")
    del steps[:]
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 210}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(IDS, tokenizer=tokenizer, stop_strings=["no such words"], **settings)
    assert len(steps) == NEW - 1


@pytest.mark.parametrize(
    "asked", [{"output_hidden_states": True, "return_dict_in_generate": True}, {"cache_implementation": "static"}]
)
def test_a_step_that_is_not_taken_is_told_once(asked, file_of, steps):
    model, _ = bstack.load(file_of("llama"), mode="packed")
    del steps[:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=210, **asked)
    told = [warning for warning in caught if issubclass(warning.category, SlowerWarning)]
    assert not steps and len(told) == 1 and "own code instead of the fused step" in str(told[0].message)


@pytest.mark.parametrize("name", ["olmo3", pytest.param("gemma3", marks=SLOW), pytest.param("cohere", marks=SLOW)])
def test_models_with_another_rope_keep_their_own_code(name, file_of):
    """Among them one rope for each kind of layer, whose type is no word but a table."""
    model, _ = bstack.load(file_of(name), mode="packed")
    assert "forward" not in vars(model) and type(model).__name__ in model.bstack_unfused
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] >= 6


@pytest.mark.parametrize("error", [TypeError, IndexError, RuntimeError, OSError])
@pytest.mark.parametrize("place", ["_decoder", "_FusedStep"])
def test_recognition_never_raises(error, place, file_of, monkeypatch):
    from bstack.engine import llama_step

    def fail(*_):
        raise error("unforeseen")

    monkeypatch.setattr(llama_step, place, fail)
    model, _ = bstack.load(file_of("llama"), mode="packed")
    assert "forward" not in vars(model) and model.bstack_unfused


def test_calls_as_of_any_model(file_of):
    model, _ = bstack.load(file_of("llama"), mode="packed")
    with torch.no_grad():
        by_place = model(IDS, torch.ones_like(IDS)).logits
        out = model(input_ids=IDS, use_cache=True)
        assert torch.equal(by_place, out.logits)
        step = model(IDS[:, :1], **{CACHE: getattr(out, CACHE)}, use_cache=True).logits
        whole = model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:]
    assert (step - whole).norm() <= 1e-2 * whole.norm()
