"""Generation settings beside a model: what transformers accepts is kept, the rest is named in a warning."""

import json
import warnings

import pytest
import tiny_models
from compressing import reconfigure
from transformers import AutoModelForCausalLM, GenerationConfig

import bstack
from bstack.errors import ModelWarning
from bstack.models.generation import read_generation

SETTINGS = bstack.Settings(codec="sign", planes=1, rank=1, samples=2, sequence_length=16)
ENDS = {"eos_token_id": [2, 7, 9], "pad_token_id": 0}

GOOD = [
    {},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    {"do_sample": False, "temperature": 0.6},
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_return_sequences": 3, "do_sample": True},
    {"penalty_alpha": 0.6, "top_k": 4, "prompt_lookup_num_tokens": 3},
    {"cache_implementation": "hybrid"},
    {"a setting of its own": [1, {"a": None}]},
    {"stop_strings": ["\u4e2d"], "pad_token_id": -1},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "bad_words_ids": [[7, 8]]},
    {"do_sample": True, "top_k": 0, "min_p": 0.1, "typical_p": 0.9, "guidance_scale": 1.5, "max_time": 5.0},
    {"stop_strings": "a", "min_length": 3, "exponential_decay_length_penalty": [4, 1.1]},
]
# With what is left out.
BAD = [
    ({"early_stopping": "maybe"}, ["early_stopping"]),
    ({"early_stopping": {}}, ["early_stopping"]),
    ({"num_return_sequences": 3}, ["num_return_sequences"]),
    ({"num_return_sequences": 3, "do_sample": True, "compile_config": 3}, ["compile_config"]),
    ({"cache_implementation": "none known", "max_new_tokens": 0}, ["cache_implementation", "max_new_tokens"]),
    ({"watermarking_config": {"a": 1}}, ["watermarking_config"]),
    ({"max_new_tokens": "ten", "temperature": 0.5}, ["max_new_tokens"]),
    ({"streamer": 1}, ["streamer"]),
    ({"pad_token_id": "x"}, ["pad_token_id"]),
    ({"pad_token_id": True}, ["pad_token_id"]),
    ({"bos_token_id": [1]}, ["bos_token_id"]),
    ({"eos_token_id": "</s>"}, ["eos_token_id"]),
    # Checked by transformers only when text is written.
    ({"repetition_penalty": 0.0}, ["repetition_penalty"]),
    ({"bad_words_ids": []}, ["bad_words_ids"]),
    ({"stop_strings": 5}, ["stop_strings"]),
    ({"stop_strings": ["a", None]}, ["stop_strings"]),
    ({"min_length": "3"}, ["min_length"]),
    ({"max_time": "x", "top_p": 0.9}, ["max_time"]),
    ({"sequence_bias": {"a": 1}}, ["sequence_bias"]),
    ({"exponential_decay_length_penalty": [1]}, ["exponential_decay_length_penalty"]),
    ({"forced_eos_token_id": 99999}, ["forced_eos_token_id"]),
    ({"do_sample": True, "temperature": 0.0, "top_k": -1}, ["temperature", "top_k"]),
    ({"eos_token_id": []}, ["eos_token_id"]),
]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("change", GOOD, ids=str)
def test_what_transformers_accepts_is_kept(tmp_path, change, mark):
    content = json.dumps({**ENDS, **change}, ensure_ascii=False)
    (tmp_path / "generation_config.json").write_text(mark + content, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_generation(tmp_path, "m", 211)
    assert found == {**ENDS, **change}
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert GenerationConfig.from_dict(found) == GenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("change", "left_out"), BAD, ids=str)
def test_the_rest_is_kept_and_what_is_left_out_is_named(tmp_path, change, left_out):
    (tmp_path / "generation_config.json").write_text(json.dumps({**change, **ENDS, **change}))
    with pytest.warns(ModelWarning) as caught:
        found = read_generation(tmp_path, "m", 211)
    assert found == {name: value for name, value in {**ENDS, **change}.items() if name not in left_out}
    said = [str(warning.message) for warning in caught if warning.category is ModelWarning]
    for message, name in zip(said, sorted(left_out), strict=True):
        assert message.startswith(f"m: generation_config.json: its {name} is left out, the rest kept: ")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b"[1]", b"null", b"\xff", b"[" * 100_000, b"{}{}"])
def test_what_cannot_be_read_is_left_out_as_a_whole(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.warns(ModelWarning, match=r"^m: generation_config\.json: cannot be read .*config\.json decides"):
        assert read_generation(tmp_path, "m", 211) is None
    (tmp_path / "generation_config.json").unlink()
    assert read_generation(tmp_path, "m", 211) is None


def test_end_tokens_of_a_container_are_those_of_transformers(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "model")
    path = folder / "generation_config.json"

    def ends():
        bstack.compress(folder, tmp_path / "a.bstk", settings=SETTINGS, overwrite=True)
        return bstack.load(tmp_path / "a.bstk")[0].generation_config.eos_token_id

    path.write_text(json.dumps({**ENDS, "num_beams": 4}))
    assert ends() == ENDS["eos_token_id"] == AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    path.write_text(json.dumps({**ENDS, "early_stopping": "maybe"}))
    with pytest.warns(ModelWarning, match="early_stopping"):
        assert ends() == ENDS["eos_token_id"]
    path.write_text("{")  # here transformers takes the token of config.json
    with pytest.warns(ModelWarning, match="cannot be read"):
        assert ends() == 2 == AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id


def test_settings_of_config_json_count_as_in_transformers(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert read_generation(folder, "m", 211) is None
    reconfigure(folder, suppress_tokens=[5], repetition_penalty=1.8, num_beams=2)
    bstack.compress(folder, tmp_path / "a.bstk", settings=SETTINGS)
    wanted = AutoModelForCausalLM.from_pretrained(folder).generation_config
    found = bstack.load(tmp_path / "a.bstk")[0].generation_config
    for name in ("suppress_tokens", "repetition_penalty", "num_beams", "eos_token_id"):
        assert getattr(found, name) == getattr(wanted, name), name
    reconfigure(folder, suppress_tokens="none")
    with pytest.warns(ModelWarning, match="its suppress_tokens is left out"):
        assert read_generation(folder, "m", 211)["repetition_penalty"] == 1.8


def test_end_tokens_beside_one_that_is_none_are_kept(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x", 7, None, True, 9], "top_k": 4}))
    with pytest.warns(ModelWarning, match=r"its eos_token_id is cut to \[7, 9\], the rest kept: .* is no token id"):
        assert read_generation(tmp_path, "m", 211) == {"eos_token_id": [7, 9], "top_k": 4}
