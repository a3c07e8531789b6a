"""Which weights the layers before have while a layer is calibrated."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import bstack
import bstk
from bstack.codecs import CODECS
from bstack.compression import layers
from bstack.models.names import MatrixName

SMALL = {"samples": 2, "sequence_length": 16}
LATER = "model.layers.1.self_attn.q_proj.weight"


def compress(model, output, codec):
    bstack.compress(model, output, settings=bstack.Settings(codec=codec, **SMALL))
    return output


def with_blocks(model, file, codec, depth):
    """The original with the first blocks of the layers' stacks."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stacks = {}
    for chunk in file.chunks:
        if chunk.is_block and chunk.level < depth and ".layers." in chunk.name:
            stacks.setdefault(chunk.name, []).append(chunk)
    for name, blocks in stacks.items():
        blocks.sort(key=lambda chunk: chunk.level)
        payloads, kinds, ranks = zip(*((file.read(b), b.kind, b.rank) for b in blocks), strict=True)
        weight = CODECS[codec].rebuild(payloads, kinds, ranks, blocks[0].shape)
        matrix = MatrixName.parse(name)
        matrix.view(whole.state_dict()[matrix.parameter], blocks[0].transposed).copy_(weight)
    return whole.eval()


@pytest.mark.parametrize(("codec", "depth"), [("trellis", 2), ("sign", None)])
def test_the_hessians_are_of_a_cut_model(tiny_llama, tmp_path, monkeypatch, codec, depth):
    seen = {}
    compress_layers, gather = layers.compress_layers, layers.gather

    def watched(skeleton, batches, *arguments):
        seen["windows"] = torch.cat(list(batches))
        return compress_layers(skeleton, batches, *arguments)

    def plain(stream, index, parameters, _weights):
        table = gather(stream, index, parameters)  # tokens of equal weight
        if index == 1:
            seen["hessian"] = table.statistics(LATER).hessian.clone()
        return table

    monkeypatch.setattr("bstack.compression.stages.compress_layers", watched)
    monkeypatch.setattr(layers, "gather", plain)
    with bstk.open(compress(tiny_llama, tmp_path / "x.bstk", codec)) as file:
        models = {d: with_blocks(tiny_llama, file, codec, d or 0) for d in (depth, 1, None)}
    inputs = {}
    for d, model in models.items():
        kept = []
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda _m, given, kept=kept: kept.append(given[0])
        )
        with torch.no_grad():
            model(seen["windows"])
        rows = kept[0].reshape(-1, kept[0].shape[-1])
        inputs[d] = rows.t() @ rows
    torch.testing.assert_close(seen["hessian"], inputs[depth], rtol=1e-4, atol=1e-3)
    assert all((inputs[d] - seen["hessian"]).abs().max() > 0.1 for d in models if d != depth)


def test_an_interrupted_run_gives_the_same_file(tiny_llama, tmp_path, monkeypatch):
    expected = compress(tiny_llama, tmp_path / "whole.bstk", "trellis").read_bytes()
    one = layers._compress_layer

    def interrupt(skeleton, index, *arguments):
        if index == 1:
            raise KeyboardInterrupt
        return one(skeleton, index, *arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(layers, "_compress_layer", interrupt)
        compress(tiny_llama, tmp_path / "resumed.bstk", "trellis")
    assert compress(tiny_llama, tmp_path / "resumed.bstk", "trellis").read_bytes() == expected
