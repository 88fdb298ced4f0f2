"""Layers may lie on several devices: the numbers recorded are those of one device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avl.hooks import Intervention, attached
from avl_analysis.capture.recorder import Recorder, record
from tests import tiny
from tests.avl_analysis.recorded import model
from tests.devices import pretend, pretended_devices


class Spread(Intervention):
    """Hands the recorder every second layer's queries, keys and values on another device."""

    def attend(self, call, inner):
        output = inner(call)
        device = f"lazy:{call.layer % 2}"
        for name in ("query", "key", "value", "mask"):
            setattr(call, name, pretend(getattr(call, name), device))
        return output


def recorded(llava, batch, **options):
    with record(llava, **options) as recording:
        llava.generate(**batch, max_new_tokens=3, do_sample=False)
    return recording


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "keep"), [([6], "attention"), ([4, 3], None)])
def test_layers_on_two_devices_are_recorded_like_layers_on_one(batch, keep, monkeypatch):
    for name in ("observe", "end"):  # pretended tensors know no inference mode
        monkeypatch.setattr(Recorder, name, getattr(Recorder, name).__wrapped__)
    llava = model(kv_heads=2, attn="sdpa")
    inputs = tiny.inputs(llava, batch)
    expected = recorded(llava, inputs, keep=keep)
    with attached(llava, Spread()), pretended_devices():
        found = recorded(llava, inputs, keep=keep)
    for name in expected.names:
        difference = np.abs(found[name] - expected[name]).max()
        assert not difference > (1e-3 if name == "text_age_fit" else 1e-5), name
        assert np.array_equal(found[name].isnull(), expected[name].isnull()), name


def test_a_pretended_device_refuses_to_be_mixed_with_another():
    with pretended_devices():
        one, other = pretend(torch.ones(2), "lazy:0"), pretend(torch.ones(2), "lazy:1")
        with pytest.raises(RuntimeError, match="different devices"):
            one + other
        with pytest.raises(RuntimeError, match="different devices"):
            one + torch.ones(2)
        assert torch.equal((one + other.to("lazy:0")).cpu(), torch.full((2,), 2.0))
