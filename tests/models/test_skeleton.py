"""Building without memory: only in the thread that asked for it."""

import threading

from torch import nn

from bstack.models.skeleton import parameters_on_meta


def test_parameters_are_on_meta_and_buffers_are_real():
    with parameters_on_meta():
        norm = nn.BatchNorm1d(3)
    assert norm.weight.is_meta and norm.weight.requires_grad and not norm.running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_build_real_modules():
    built = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not built[0].weight.is_meta
