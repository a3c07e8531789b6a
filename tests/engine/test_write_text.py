"""Writing text: token by token, whatever way of decoding the model's files ask for."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import bstack
from bstack.bench.speed import measure_speed
from bstack.engine.generate import encode_prompt, write_text
from bstack.errors import ModelWarning, UnsupportedModelError
from bstk.errors import UsageError

NEW = 12


@pytest.fixture(scope="module")
def original(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.bstk"
    bstack.compress(tiny_llama, path, settings=bstack.Settings(codec="sign", planes=4, samples=2, sequence_length=16))
    return bstack.load(path, mode="packed")


def written(model, tokenizer, settings, **options):
    """Return the new text, the settings' names that a warning gave, and the model's settings afterwards."""
    model.generation_config = own = GenerationConfig(**settings)
    pieces = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = encode_prompt(tokenizer, "the river", chat=False)
        text = write_text(model, tokenizer, ids, pieces.append, **{"max_new_tokens": NEW, **options}).text
    assert "".join(pieces) == text and model.generation_config is own
    found = [str(warning.message) for warning in caught if issubclass(warning.category, ModelWarning)]
    assert len(found) <= 1
    return text, found[0] if found else ""


MODES = {
    "beams": {"num_beams": 4, "early_stopping": True},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "beams and texts": {"num_beams": 3, "num_return_sequences": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 1},
    "early exit": {"assistant_early_exit": 1},
    "dola": {"dola_layers": "high"},
    "constraints": {"constraints": [[5]], "num_beams": 2},
    "forced words": {"force_words_ids": [[5]], "num_beams": 2},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "more at once": {"use_mtp": True},
    "healing": {"token_healing": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_other_ways_of_decoding_are_left_out_with_one_warning(original, packed, mode):
    for model, tokenizer in (original, packed):
        plain, _ = written(model, tokenizer, {}, do_sample=False)
        text, warning = written(model, tokenizer, MODES[mode], do_sample=False)
        assert text == plain
        assert next(iter(MODES[mode])) in warning and "token by token" in warning


OTHERS = [
    {"max_length": 2},
    {"max_new_tokens": 1},
    {"cache_implementation": "static"},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    {"use_cache": False},
    {"do_sample": True, "temperature": 3.0, "top_k": 2},
    {"num_beams": 1, "num_return_sequences": 1, "penalty_alpha": 0.0, "token_healing": False},
    {"is_assistant": True, "num_assistant_tokens": 20, "prefill_chunk_size": 2},
]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_settings_of_other_runs_do_not_count_and_need_no_word(original, settings):
    plain, _ = written(*original, {}, do_sample=False)
    assert written(*original, settings, do_sample=False) == (plain, "")


def test_what_decides_the_next_token_and_the_end_counts(original):
    model, tokenizer = original
    ids = encode_prompt(tokenizer, "the river", chat=False)
    model.generation_config = GenerationConfig()
    plain = model.generate(
        ids, generation_config=GenerationConfig(max_new_tokens=NEW, pad_token_id=0, eos_token_id=300)
    )
    new = plain[0, ids.shape[1] :].tolist()
    for settings in (
        {"eos_token_id": [300, new[4]]},
        {"stop_strings": [tokenizer.decode(new[5:7])]},
        {"repetition_penalty": 3.0},
        {"suppress_tokens": [new[3]]},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 7},
    ):
        settings = {"eos_token_id": 300, "pad_token_id": 0, **settings}
        model.generation_config = GenerationConfig()
        wanted = model.generate(
            ids, generation_config=GenerationConfig(max_new_tokens=NEW, **settings), tokenizer=tokenizer
        )
        text, warning = written(model, tokenizer, settings, do_sample=False)
        assert wanted.tolist() != plain.tolist() and not warning
        assert text == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_models_sampling_counts_where_it_samples(original):
    plain, _ = written(*original, {}, do_sample=False)
    assert written(*original, {"top_k": 1}, do_sample=True, seed=3)[0] == plain
    hot = {"temperature": 5.0, "top_k": 200}
    assert written(*original, hot, do_sample=True, seed=3)[0] != plain
    assert written(*original, hot, do_sample=True, seed=3, top_k=1)[0] == plain


@pytest.mark.parametrize("options", [{"top_k": -1}, {"temperature": 0.0}, {"repetition_penalty": "x"}])
def test_options_that_transformers_refuses_are_the_callers(original, options):
    with pytest.raises(UsageError, match=f"refuses these options: .*{next(iter(options)).split('_')[-1]}"):
        written(*original, {}, do_sample=True, **options)


def test_what_the_caller_asks_of_outputs_stays(original):
    model, _ = original
    asked = {"output_hidden_states": True, "return_dict": False}
    plain = written(*original, {}, do_sample=False)
    try:
        for name, value in asked.items():
            setattr(model.config, name, value)
        assert written(*original, {}, do_sample=False) == plain
        assert {name: getattr(model.config, name) for name in asked} == asked
    finally:
        model.config.output_hidden_states, model.config.return_dict = False, True


def test_an_id_beyond_the_embedding(original):
    model, tokenizer = original
    longer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    longer.add_tokens(["<extra>"])
    ids = encode_prompt(longer, "the river <extra>", chat=False)
    with pytest.raises(
        UnsupportedModelError, match=r"^the prompt: the tokenizer gives '<extra>' the id 211.* 211 rows"
    ):
        write_text(model, longer, ids, lambda _text: None)


def test_speed_is_that_of_decoding_token_by_token(original, monkeypatch):
    model, _ = original
    monkeypatch.setattr("bstack.bench.speed._lengths", lambda _context: (5, 4))
    monkeypatch.setattr("bstack.bench.speed.REPETITIONS", 2)
    steps = []
    hook = model.register_forward_hook(lambda _model, _args, result: steps.append(tuple(result.logits.shape[:2])))
    for settings in (*MODES.values(), *OTHERS, {"forced_eos_token_id": 5, "stop_strings": ["x"]}):
        model.generation_config = GenerationConfig(**settings)
        steps.clear()
        measure_speed(model)
        assert steps == 3 * [(1, 1)] * 5
    hook.remove()
    assert torch.is_inference_mode_enabled() is False
