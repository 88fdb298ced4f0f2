"""Policies on a device that is no processor: tensors do not mix, and a decode step reads little.

The device is pretended (tests/devices.py): its tensors keep their numbers, refuse to meet those of
the processor, and what runs on them is the plain version of the kernels, as on any device that is
not a processor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import avl
from avl.cache import AdaptiveLayer
from avl.decode_step import DecodeStep
from avl.hooks import AttentionHooks
from avl.policies.base import Policy
from avl.session import AdaptiveSession
from tests import tiny
from tests.avl.generating import generate
from tests.devices import Pretended, pretend, pretended_devices

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
"""Operations that make the processor wait for a number of the device."""
DEVICE = "lazy:0"
STEPS, LAYERS = 7, 3

POLICIES = {
    "full": avl.FullPolicy(),
    "a-vl": avl.AdaptivePolicy(text=0.3),
    "a-vl, text kept": avl.AdaptivePolicy(text=None),
    "in few bits": avl.AdaptivePolicy.with_cold_tier(),
    "exchange with few bits": avl.AdaptivePolicy(secondary=0.3, core=0.2, cold=(8, 4)),
    "sparse": avl.AdaptivePolicy(secondary=0.3, core=0.2, cold=8, sparse_refresh=True),
    "drift": avl.AdaptivePolicy(drift=0.99),
    "h2o": avl.H2OPolicy(budget=0.5),
    "random": avl.RandomPolicy(budget=0.5),
    "streaming": avl.StreamingPolicy(budget=0.5),
    "snapkv": avl.SnapKVPolicy(budget=0.5),
}


class Reads(TorchDispatchMode):
    """Counts operations that read a number from their device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = function.overloadpacket is torch.ops.aten._to_copy and (
            isinstance(args[0], Pretended) and kwargs.get("device") == torch.device("cpu")
        )
        self.count += leaves or function.name().split(".")[0] in READS
        return function(*args, **kwargs)


@contextmanager
def on_a_device(patch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """Keys, values, queries and layouts lie on the pretended device; reads of each decode step."""
    reads: Counter[int] = Counter()
    update, attend = AdaptiveLayer.update, AdaptiveSession.attend
    layout = AttentionHooks._layout

    def there(tensor: Tensor | None) -> Tensor | None:
        return tensor if isinstance(tensor, Pretended) else pretend(tensor, DEVICE)

    def updated(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(self, there(key), there(value), *args, **kwargs)

    def attended(self: Any, call: Any, inner: Any) -> Tensor:
        for name in ("query", "key", "value", "mask"):
            setattr(call, name, there(getattr(call, name)))
        output = attend(self, call, inner)
        assert isinstance(output, Pretended)
        return output.numbers

    def laid_out(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = layout(self, *args, **kwargs)
        tensors = {
            name: there(value) for name, value in vars(found).items() if isinstance(value, Tensor)
        }
        return replace(found, **tensors)

    def counting(name: str) -> Any:
        original = getattr(DecodeStep, name)

        def count(self: DecodeStep, *args: Any) -> Any:
            before = lists["calls"]
            with Reads() as mode:
                result = original(self, *args)
            reads[self.forward.step] += mode.count + lists["calls"] - before
            return result

        return count

    lists: Counter[str] = Counter()
    tolist = Pretended.tolist

    def listed(self: Pretended) -> Any:  # does not pass the dispatcher
        lists["calls"] += 1
        return tolist(self)

    with patch.context() as inside, pretended_devices():
        inside.setattr(Pretended, "tolist", listed)
        inside.setattr(AdaptiveLayer, "update", updated)
        inside.setattr(AdaptiveSession, "attend", attended)
        inside.setattr(AttentionHooks, "_layout", laid_out)
        for name in ("attend", "end"):
            inside.setattr(DecodeStep, name, counting(name))
        yield reads


def of_steps(policy: Policy, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Counter[int]]:
    """Tokens and logits on the device, and reads by decode step."""
    model = tiny.llava(kv_heads=2, layers=LAYERS, attn="sdpa")
    with on_a_device(patch) as reads, avl.adaptive(model, policy):
        tokens, logits = generate(model, tiny.inputs(model, [9]), steps=STEPS)
    return tokens, logits, reads


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_runs_on_another_device_as_on_the_processor(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, logits, reads = of_steps(policy, monkeypatch)
    model = tiny.llava(kv_heads=2, layers=LAYERS, attn="sdpa")
    with avl.adaptive(model, policy):
        expected, expected_logits = generate(model, tiny.inputs(model, [9]), steps=STEPS)
    assert torch.equal(tokens, expected)
    assert torch.allclose(logits, expected_logits, atol=1e-4)
    assert sorted(reads) == list(range(1, STEPS))
    refresh = getattr(policy, "refresh_every", 0) or STEPS
    ordinary = [count for step, count in reads.items() if step % refresh]
    of_refreshes = [count for step, count in reads.items() if not step % refresh]
    if getattr(policy, "drift", None) is not None:  # looks at the core's weights at every step
        assert max(ordinary + of_refreshes) <= 4 * LAYERS
    else:
        assert max(ordinary) == 0
        exchanges = getattr(policy, "cold", None) is not None
        assert max(of_refreshes, default=0) <= (5 if exchanges else 2) * LAYERS
