"""The decoding benchmark measures what it says: all ways of doing A-VL agree on every step it
times.
"""

from pathlib import Path

import pytest

import avl
from avl.attention import attend_one_row
from tests.benchmarks import decoding, machine


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
    assert result.filled["preset"] < 0.7 * result.filled["stock"]
    assert set(result.whole_ms) == set(decoding.VARIANTS)


def test_variants_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decoding.MaskedStep, "ordinary", lambda self, call, layer: attend_one_row(call)
    )
    small = decoding.Setting(4, 1, 1, "float32", heads=4, width=16, grid=8, layers=1)
    with pytest.raises(AssertionError, match="avl and masked differ"):
        decoding.measure(small, cycles=1, whole_cycles=1)


def test_a_preset_that_attends_to_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "PRESET", avl.AdaptivePolicy.with_cold_tier(cold=2))
    small = decoding.Setting(4, 1, 1, "float32", heads=4, width=16, grid=8, layers=1)
    with pytest.raises(AssertionError, match="the preset's outputs"):
        decoding.measure(small, cycles=1, whole_cycles=1)


def test_a_benchmark_says_which_instructions_the_processor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("model name : X\nflags : fpu avx2 amx_bf16 avx512fx\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.instructions() == "avx2 amx_bf16"
    assert machine.environment()["instructions"] == "avx2 amx_bf16"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.instructions() == "unknown"
