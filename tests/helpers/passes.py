"""The streamed pass, the ordinary model that it is compared with, and the token ids that both see."""

import tiny_models
import torch

from bstack.calibration.statistics import gather
from bstack.calibration.stream import LayerStream
from bstack.models.skeleton import layer_parameters

IDS = torch.randint(3, tiny_models.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(3))
BATCHES = list(IDS.split(2))


def streamed_tables(skeleton, batches=BATCHES):
    """The statistics of every layer, by the streamed pass."""
    tables = []
    with skeleton.loaded(skeleton.outside_names), LayerStream(skeleton, batches) as stream:
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                tables.append(gather(stream, index, layer_parameters(skeleton, index)))
    return tables, stream.results


def exact(name):
    """The ordinary model in float64, which not every way to run experts knows."""
    model = tiny_models.make(name).double()
    model.set_experts_implementation("eager")
    return model


def linears(model):
    from transformers.pytorch_utils import Conv1D

    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and (".layers." in name or ".h." in name)
    }
