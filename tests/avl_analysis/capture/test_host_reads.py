"""What a decode step waits for: numbers that leave the device do not grow with the layers.

A processor has no device to leave, so the ways to do it are counted instead: reading a number
(`item`, `bool`, `int`), indices of what is true, and copies to lists, arrays or host memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from avl_analysis.capture.decode_sums import DecodeSums, LayerArrays
from avl_analysis.capture.plan import LayerResult
from avl_analysis.capture.recorder import Recorder, record
from avl_analysis.statistics.inputs import TOKEN_INFO, TokenInfo
from tests import tiny

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
COPIES = ("cpu", "numpy", "tolist")


class Reads(TorchDispatchMode):
    """Counts operations that read a number from their device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().split(".")[0]
        if name in READS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Reads and copies of the recorder while the block runs."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(tensor, *args, **kwargs)

        return count

    with patch.context() as inside:
        for name in COPIES:
            inside.setattr(Tensor, name, counting(name))
        for method in ("begin", "observe", "end"):
            original = getattr(Recorder, method)

            def watched(self: Recorder, *args: Any, original: Any = original) -> None:
                with Reads() as reads:
                    original(self, *args)
                counts.update(reads.counts)

            inside.setattr(Recorder, method, watched)
        yield counts


def of_one_step(layers: int, patch: pytest.MonkeyPatch) -> Counter[str]:
    """Reads and copies of the fourth decode step."""
    model = tiny.llava(kv_heads=2, layers=layers, attn="sdpa")
    inputs = tiny.inputs(model, [9])
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), record(model) as recording:
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for token in range(4):
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            step = {
                "input_ids": torch.tensor([[40 + token]]),
                "attention_mask": mask,
                "past_key_values": cache,
            }
            if token < 3:
                model(**step)
                continue
            with counted(patch) as counts:
                model(**step)
    assert recording["modality_mass"].sizes["step"] == 5
    return counts


def test_a_decode_step_reads_as_much_with_many_layers_as_with_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = of_one_step(2, monkeypatch), of_one_step(7, monkeypatch)
    assert few == many
    assert 0 < sum(few.values()) <= 45


def result(heads: int, keys: int, device: str) -> LayerResult:
    """A layer's numbers of a decode step with `keys` keys in order."""
    rank = torch.arange(keys, device=device)[None]
    info = TokenInfo(*(rank for _ in TOKEN_INFO))
    info.__dict__["in_order"] = True
    return LayerResult(
        info,
        torch.ones(heads, 4, device=device),
        torch.full((heads, keys), 1 / keys, device=device),
        received=torch.full((heads, 1, keys), 1 / keys, device=device),
        queries=torch.ones(1, 1, keys, device=device),
        ages=torch.ones(heads, 5, dtype=torch.float64, device=device),
        pairs=torch.ones(1, 5, dtype=torch.float64, device=device),
    )


def test_sums_of_decode_steps_stay_on_their_device_and_read_nothing() -> None:
    """On the meta device, where tensors have no numbers that could be read."""
    sums, arrays = DecodeSums(), LayerArrays()
    for keys in range(300, 300 + 400):
        step = result(2, keys, "meta")
        sums.add_received(step, keys)
        sums.add_ages(step)
        arrays.append([step.step, None], (2, 4))
    for tensor in (sums.received, sums.queries, sums.ages, sums.pairs):
        assert tensor is not None
        assert tensor.device.type == "meta"
    with pytest.raises(NotImplementedError):  # here is where numbers leave
        arrays.arrays()


def test_sums_of_decode_steps_are_the_sums() -> None:
    sums = DecodeSums()
    for keys in (3, 4, 300):
        sums.add_received(result(2, keys, "cpu"), keys)
        sums.add_ages(result(2, keys, "cpu"))
    expected = torch.zeros(2, 300)
    for keys in (3, 4, 300):
        expected[:, :keys] += 1 / keys
    assert torch.allclose(sums.received[:, :300], expected)
    assert sums.queries[0, :5].tolist() == [3, 3, 3, 2, 1]
    assert bool((sums.ages == 3).all() & (sums.pairs == 3).all())
