"""A compiled model is recorded and adapted like any other."""

from __future__ import annotations

import pytest
import torch

import avl
from avl_analysis.capture.recorder import record
from tests import tiny
from tests.avl_analysis.recorded import close, model


def compile_all(llava):
    llava.forward = torch.compile(llava.forward, backend="eager")


def compile_decoder(llava):
    decoder = llava.get_decoder()
    decoder.forward = torch.compile(decoder.forward, backend="eager")


def compile_attention(llava):
    for layer in llava.get_decoder().layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")


pytestmark = pytest.mark.slow


def compiled(how):
    torch.compiler.reset()
    llava = model(kv_heads=2, attn="sdpa")
    how(llava)
    return llava


def generate(llava, batch):
    return llava.generate(**batch, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("how", [compile_all, compile_attention])
def test_a_compiled_model_is_recorded_like_one_that_is_not(how):
    plain, fast = model(kv_heads=2, attn="sdpa"), compiled(how)
    batch = tiny.inputs(plain, [6, 3])
    with record(plain) as expected:
        answer = generate(plain, batch)
    assert torch.equal(generate(fast, batch), answer)
    with record(fast) as found:
        assert torch.equal(generate(fast, batch), answer)
    assert found.samples == expected.samples
    for name in ("modality_mass", "entropy_prefill", "accumulated_score"):
        close(found[name], expected[name], 1e-5)
    assert torch.equal(generate(fast, batch), answer)


@pytest.mark.parametrize("how", [compile_decoder])
def test_a_compiled_model_is_adapted_like_one_that_is_not(how):
    plain, fast = model(kv_heads=2, attn="sdpa"), compiled(how)
    batch = tiny.inputs(plain, [6, 3])
    with avl.adaptive(plain, avl.AdaptivePolicy()) as expected:
        answer = generate(plain, batch)
    with avl.adaptive(fast, avl.AdaptivePolicy()) as session:
        assert torch.equal(generate(fast, batch), answer)
    assert session.usage() == expected.usage()
