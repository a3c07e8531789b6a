"""What a rehearsal finds, and that it leaves no trace."""

import pytest
import torch

import bstack.calibration.rehearsal as rehearsal
import bstack.calibration.selftext as selftext
from bstack.calibration.rehearsal import rehearse
from bstack.errors import UnsupportedModelError
from bstack.models.skeleton import zeros_for_weights
from bstk.errors import BstkError


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt-projected"])
def test_nothing_stays_loaded_and_no_file_is_read(skeletons, name, monkeypatch):
    skeleton = skeletons(name)
    checkpoint = skeleton.checkpoint
    monkeypatch.setattr(type(checkpoint), "load", lambda *_: pytest.fail("the checkpoint was read"))
    buffers = {name: buffer.clone() for name, buffer in skeleton.model.named_buffers()}
    rehearse(skeleton, writes_text=True)
    assert skeleton.checkpoint is checkpoint
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in skeleton.model.named_buffers())


def test_zeros_take_the_place_of_weights_and_share_their_memory(skeletons):
    skeleton = skeletons("llama")
    names = list(skeleton.model.state_dict())
    with zeros_for_weights(skeleton), skeleton.loaded(names, torch.bfloat16):
        found = [skeleton.parameter(name) for name in names]
        assert all(not p.is_meta and p.dtype == torch.bfloat16 and not p.any() for p in found)
        assert len({p.untyped_storage().data_ptr() for p in found}) == 1
        assert len({p.data_ptr() for p in found}) == len(found), "products tell weights apart by their address"


# As torch's allocator says it.
NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory. Error code 12 (Cannot allocate memory)")


@pytest.mark.parametrize("error", [TypeError("odd"), RuntimeError("meta"), AttributeError("x"), KeyError("y")])
def test_what_goes_wrong_is_a_refusal_by_name(skeletons, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(rehearsal, "output_sensitivity", fail)
    with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM.* one layer at a time: {type(error).__name__}"):
        rehearse(skeletons("llama"), writes_text=False)


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), NO_MEMORY])
@pytest.mark.parametrize(
    "place", [(rehearsal, "output_sensitivity"), (rehearsal, "rehearse_writing"), (selftext, "_write")]
)
def test_what_the_machine_lacks_is_not_blamed_on_the_model(skeletons, monkeypatch, error, place):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*place, fail)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with pytest.raises(type(error)) as raised:
        rehearse(skeletons("llama"), writes_text=True)
    assert raised.value is error


def test_a_model_that_writes_no_text_needs_one(skeletons, monkeypatch):
    def fail(*_, **__):
        raise TypeError("no cache")

    monkeypatch.setattr(selftext, "_write", fail)
    with pytest.raises(BstkError, match=r"no cache\. Give a calibration text") as raised:
        rehearse(skeletons("llama"), writes_text=True)
    assert raised.value.option == "calibration"
    rehearse(skeletons("llama"), writes_text=False)


def test_a_model_that_does_not_bear_bfloat16_writes_in_float32(skeletons, monkeypatch):
    capable = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    assert selftext._dtype(skeletons("llama")) == torch.bfloat16
    skeleton = skeletons("gpt2")
    hook = skeleton.model.transformer.wte.register_forward_hook(lambda _module, _args, output: output.float())
    try:
        assert selftext._dtype(skeleton) == torch.float32
    finally:
        hook.remove()
    capable.clear()
    assert selftext._dtype(skeletons("llama")) == torch.float32
