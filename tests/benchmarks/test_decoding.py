"""The decoding benchmark measures what it says: all ways of doing A-VL agree on every step it
times.
"""

import pytest

from avl.attention import attend_one_row
from tests.benchmarks import decoding


@pytest.mark.parametrize(
    "setting", [(4, 1, 1), (2, 2, 2)], ids=["MHA", "GQA, two pictures, batch 2"]
)
def test_masked_sliced_and_this_avl_agree_and_hold_the_same_bytes(
    setting: tuple[int, int, int],
) -> None:
    kv_heads, images, batch = setting
    small = decoding.Setting(
        kv_heads, images, batch, "float32", heads=4, width=16, grid=8, layers=2
    )
    result = decoding.measure(small, cycles=2, whole_cycles=1)
    assert result.filled["avl"] == result.filled["masked"] == result.filled["sliced"]
    assert result.filled["full"] == result.filled["stock"]
    assert result.allocated["avl"] >= result.filled["avl"]
    assert set(result.whole_ms) == set(decoding.VARIANTS)


def test_variants_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decoding.MaskedStep, "ordinary", lambda self, call, layer: attend_one_row(call)
    )
    small = decoding.Setting(4, 1, 1, "float32", heads=4, width=16, grid=8, layers=1)
    with pytest.raises(AssertionError, match="avl and masked differ"):
        decoding.measure(small, cycles=1, whole_cycles=1)
