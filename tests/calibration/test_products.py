"""Watching products: batched experts, experts without tokens, and the order of layers."""

import pytest
import torch

from bstack.calibration.sensitivity import _Squares
from bstack.calibration.statistics import HessianTable, ProductWatch
from bstack.calibration.stream import LayerStream
from bstack.errors import UnsupportedModelError


def test_batched_experts_get_the_gradients_of_their_own_slice():
    weights = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(3, 7, 5, requires_grad=True)
    squares = _Squares()
    with ProductWatch({"experts": weights}, squares.report):
        output = torch.bmm(inputs, weights)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    assert squares.sums.keys() == {"experts[0]", "experts[1]", "experts[2]"}
    for index in range(3):
        assert torch.allclose(squares.sums[f"experts[{index}]"], gradient[index].square().sum(0))


def test_experts_without_tokens_share_nothing():
    weights = torch.randn(3, 6, 4)
    table = HessianTable()
    watch = ProductWatch({"experts": weights}, table.report)
    tokens = torch.randn(5, 4)
    for batch in ((0, 0, 5), (0, 5, 0)):
        table.start_batch()
        with watch:
            for expert, count in enumerate(batch):
                torch.nn.functional.linear(tokens[:count], weights[expert])
    assert table.operands.keys() == {"experts[1]", "experts[2]"}
    assert table.statistics("experts[1]") is not table.statistics("experts[2]")
    assert torch.allclose(table.statistics("experts[1]").hessian, tokens.t() @ tokens, atol=1e-5)


class Skeleton:
    """What the stream needs of one, around a model that runs its layers in an order of its own."""

    def __init__(self, order):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

            def forward(self, input_ids, use_cache):
                x = input_ids.float()
                for index in order:
                    x = self.layers[index](x)
                return x

        self.model = Model()
        self.model.base_model = None
        self.input_name, self.output_name = "embedding.weight", "head.weight"
        self.layers = [(f"layers.{i}", layer) for i, layer in enumerate(self.model.layers)]


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 1), (0, 1, 2, 0), (0, 0, 1, 2), ()])
def test_layers_out_of_order_are_refused(order):
    skeleton = Skeleton(order)
    ids = torch.ones(1, 2, dtype=torch.long)
    run = lambda ids: skeleton.model(ids, use_cache=False)  # noqa: E731
    with (
        pytest.raises(UnsupportedModelError, match="cannot be streamed"),
        LayerStream(skeleton, [ids], run=run) as stream,
    ):
        for index, _ in stream.steps():
            stream.run_all(index)


def test_layers_in_order_are_run():
    skeleton = Skeleton((0, 1, 2))
    ids = torch.ones(1, 2, dtype=torch.long)
    run = lambda ids: skeleton.model(ids, use_cache=False)  # noqa: E731
    with LayerStream(skeleton, [ids], run=run) as stream:
        for index, _ in stream.steps():
            stream.run_all(index)
        result = stream.results[0]
    assert torch.allclose(result, skeleton.model(ids, False))
