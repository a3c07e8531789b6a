"""The stream of layers: what is in memory meanwhile, and how it ends early."""

import threading

import pytest
from passes import BATCHES, streamed_tables

from bstack.calibration.stream import LayerStream


def test_one_layer_at_a_time_is_in_memory(skeletons):
    skeleton = skeletons("llama")

    def held():
        return {n for n, p in skeleton.model.named_parameters() if p.device.type != "meta"}

    assert not held()
    with skeleton.loaded(skeleton.outside_names), LayerStream(skeleton, BATCHES) as stream:
        outer = held()
        assert not any(".layers." in name for name in outer)
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                assert held() == outer | set(skeleton.layer_names(index))
                stream.run_all(index)
    assert not held()


def test_a_stream_that_is_left_early_ends_its_threads(skeletons):
    skeleton, before = skeletons("llama"), threading.active_count()
    with (
        pytest.raises(ZeroDivisionError),
        skeleton.loaded(skeleton.outside_names),
        LayerStream(skeleton, BATCHES) as stream,
    ):
        for index, _ in stream.steps():
            with skeleton.loaded(skeleton.layer_names(index)):
                raise ZeroDivisionError
    assert threading.active_count() <= before, "those of other tests may have ended meanwhile"
    streamed_tables(skeleton)  # and the skeleton is as good as new
