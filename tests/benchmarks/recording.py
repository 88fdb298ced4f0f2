"""What recording costs, at the width of LLaVA-1.5-7B: 32 heads of 128 in decoder layers with random
weights.

    python tests/benchmarks/recording.py             # every setting: half an hour and more, 2 cores
    python tests/benchmarks/recording.py --quick     # one layer, the short prompt, float32
    python tests/benchmarks/recording.py --out cost.json

Prefills are measured in rounds: plain SDPA, the same with all statistics recorded, and eager
attention with `output_attentions=True`, one after another. Ratios are taken within a round and
their median is reported, so that a machine that is busy with other things slows all three alike.

Decode steps are timed in turn, a plain one, then a recorded one of a twin of the model (other
modules, the same weights in memory); the median of their ratios counts, pair by pair. They run in a
process of their own whose C library keeps freed memory: otherwise it depends on what ran before
whether the cache, copied at every step, comes from fresh pages, which can double the time of a
plain step. The prompts before them leave out the MLPs, whose time does not matter there.

Memory is measured in a process of its own, too, with large allocations returned to the system at
once, so that the resident size follows what is really held, and after a first pass, in which
libraries take memory of their own. The attention there has the same heads, but the layers around it
are narrow, which saves minutes: what stands beside the attention depends on the heads alone. "own"
is the most the recorder held at any moment, what it keeps included; "maps" is the size of ONE
layer's maps in float32, n x n x heads x 4 bytes.

A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than float32
ones; there, one round that counts (`--dtypes bfloat16 --rounds 1 --warmup 0`) takes about 20
minutes.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from avl_analysis.capture.recorder import Recorder, record
from tests.benchmarks.machine import PROCESSOR_TIME, environment

CLOCK: Callable[[], float] = time.perf_counter
HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 32, 128, 4096, 11008
NARROW = 256
"""Hidden and intermediate size of the layers in which memory is measured."""
IMAGE, VOCABULARY, SIDE, PATCH = 5, 1000, 24, 4
PROMPTS = {640: 1, 2944: 5, 8128: 14, 16192: 28}
"""Prompt length -> pictures of 24 x 24 tokens in it; the other 64 tokens are text."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Settings of glibc's `mallopt`."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Cost:
    """One setting; times in seconds, sizes in bytes, ratios as medians over rounds."""

    prompt: int
    dtype: str
    layers: int
    rounds: int
    plain_prefill: float
    recorded_prefill: float
    eager_prefill: float
    recorded_over_plain: float
    recorded_over_eager: float
    plain_step: float
    recorded_step: float
    step_ratio: float
    maps: int
    own_peak: int
    own_over_maps: float
    kept: int
    eager_peak_extra: int


def build(
    layers: int, dtype: torch.dtype, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompt(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """System text, pictures, question."""
    pictures = PROMPTS[length]
    image = [IMAGE] * (pictures * SIDE * SIDE)
    text = length - len(image)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, VOCABULARY, (text,), generator=generator).tolist()
    system = min(8, text - 1)
    ids = torch.tensor([words[:system] + image + words[system:]])
    pixels = torch.randn(pictures, 3, SIDE * PATCH, SIDE * PATCH, generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@dataclass
class Taken:
    """Seconds of one round of prefills."""

    plain: float
    recorded: float
    eager: float


def use_clock(processor_time: bool) -> None:
    """Measure elapsed time, or the processor time of all threads."""
    global CLOCK
    CLOCK = time.process_time if processor_time else time.perf_counter


class Bench:
    """One prompt, run in the three ways."""

    def __init__(self, model: LlavaForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, inputs

    @torch.no_grad()
    def prefill(
        self, model: LlavaForConditionalGeneration, **options: Any
    ) -> tuple[float, DynamicCache]:
        cache = DynamicCache(config=model.config.get_text_config())
        start = CLOCK()
        kept = model(
            **self.inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **options
        )
        elapsed = CLOCK() - start
        del kept
        return elapsed, cache

    def round(self) -> Taken:
        self.model.set_attn_implementation("sdpa")
        plain, _ = self.prefill(self.model)
        with record(self.model, stop=()) as recording:
            recorded, _ = self.prefill(self.model)
        assert len(recording) == 1
        self.model.set_attn_implementation("eager")
        eager, _ = self.prefill(self.model, output_attentions=True)
        return Taken(plain, recorded, eager)

    @torch.no_grad()
    def decode(
        self,
        one: tuple[LlavaForConditionalGeneration, DynamicCache],
        other: tuple[LlavaForConditionalGeneration, DynamicCache],
        steps: int,
    ) -> list[tuple[float, float]]:
        """Seconds of every decode step of two runs, in turn; the first, which touches new memory,
        left out.
        """
        seconds, mask = [], self.inputs["attention_mask"]
        for token in range(steps + 1):
            mask, ids = torch.cat([mask, mask.new_ones(1, 1)], 1), torch.tensor([[20 + token]])
            row = []
            for model, cache in (one, other):
                start = CLOCK()
                model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                row.append(CLOCK() - start)
            seconds.append((row[0], row[1]))
        return seconds[1:]


def prefills(bench: Bench, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Times and ratios; the first `warmup` rounds are thrown away."""
    taken = []
    for _ in range(warmup + rounds):
        taken.append(bench.round())
        gc.collect()
    taken, middle = taken[warmup:], statistics.median
    return {
        "plain_prefill": middle(one.plain for one in taken),
        "recorded_prefill": middle(one.recorded for one in taken),
        "eager_prefill": middle(one.eager for one in taken),
        "recorded_over_plain": middle(one.recorded / one.plain for one in taken),
        "recorded_over_eager": middle(one.recorded / one.eager for one in taken),
    }


# -- decode steps -----


def keep_freed_memory() -> None:
    """Have the C library take blocks up to 32 MiB (the most it allows) from its heap, and never
    shrink that.
    """
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same weights in memory under modules of their own, so that one can be recorded and the
    other not.
    """
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


@contextmanager
def without_mlps(*models: LlavaForConditionalGeneration) -> Iterator[None]:
    layers = [layer for model in models for layer in model.model.language_model.layers]
    own = [layer.mlp for layer in layers]
    for layer in layers:
        layer.mlp = torch.nn.Identity()
    try:
        yield
    finally:
        for layer, mlp in zip(layers, own, strict=True):
            layer.mlp = mlp


def decode_steps(
    dtype: str,
    layers: int,
    length: int,
    steps: int,
    rounds: int,
    threads: int,
    processor_time: bool,
) -> dict[str, float]:
    """Medians over the steps of all rounds; to be called in a process of its own."""
    keep_freed_memory()
    use_clock(processor_time)
    torch.set_num_threads(threads)
    model = build(layers, DTYPES[dtype])
    model.set_attn_implementation("sdpa")
    other, bench, pairs = twin(model), Bench(model, prompt(length, DTYPES[dtype])), []
    for _ in range(rounds):
        with record(other, stop=()) as recording:
            with without_mlps(model, other):
                (_, cache), (_, watched) = bench.prefill(model), bench.prefill(other)
            pairs += bench.decode((model, cache), (other, watched), steps)
        assert len(recording) == 1
        del cache, watched
    middle = statistics.median
    return {
        "plain_step": middle(plain for plain, _ in pairs),
        "recorded_step": middle(recorded for _, recorded in pairs),
        "step_ratio": middle(recorded / plain for plain, recorded in pairs),
    }


# -- memory -----


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def return_large_blocks() -> None:
    """Have the C library give freed blocks above 64 KiB back at once instead of keeping them for
    reuse.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


@contextmanager
def watched_recorder() -> Iterator[dict[str, int]]:
    """Resident size while the recorder works: the most it held at a time, and what it kept."""
    sizes = {"peak": 0, "kept": 0}
    names = ("begin", "observe", "end")
    originals = {name: getattr(Recorder, name) for name in names}

    def watch(original: Callable[..., None]) -> Callable[..., None]:
        def watching(self: Recorder, *args: Any) -> None:
            _reset_peak()
            before = _status("VmRSS")
            original(self, *args)
            sizes["peak"] = max(sizes["peak"], sizes["kept"] + _status("VmHWM") - before)
            sizes["kept"] += _status("VmRSS") - before

        return watching

    for name, original in originals.items():
        setattr(Recorder, name, watch(original))
    try:
        yield sizes
    finally:
        for name, original in originals.items():
            setattr(Recorder, name, original)


def memory(dtype: str, layers: int, length: int) -> dict[str, int]:
    """Sizes in bytes; to be called in a process of its own, whose heap holds no blocks freed
    before.
    """
    return_large_blocks()
    bench = Bench(build(layers, DTYPES[dtype], NARROW, NARROW), prompt(length, DTYPES[dtype]))
    bench.model.set_attn_implementation("sdpa")
    with record(bench.model, stop=()):  # libraries take memory of their own at their first use
        bench.prefill(bench.model)
    with watched_recorder() as sizes, record(bench.model, stop=()):
        bench.prefill(bench.model)
    peaks = []
    for implementation, options in (("sdpa", {}), ("eager", {"output_attentions": True})):
        bench.model.set_attn_implementation(implementation)
        gc.collect()
        _reset_peak()
        before = _status("VmRSS")
        bench.prefill(bench.model, **options)
        peaks.append(_status("VmHWM") - before)
    if sizes["peak"] < length * HEADS * 4:  # less than one row of weights cannot be
        raise RuntimeError(f"the recorder's memory was not seen: {sizes['peak']} bytes")
    return {
        "own_peak": sizes["peak"],
        "kept": sizes["kept"],
        "eager_peak_extra": peaks[1] - peaks[0],
    }


def long_prompt(dtype: str, length: int) -> dict[str, int]:
    """Most resident bytes of a plain and of a recorded prefill of one narrow layer; to be called in
    a process of its own.
    """
    return_large_blocks()
    model = build(1, DTYPES[dtype], NARROW, NARROW)
    model.set_attn_implementation("sdpa")
    first = Bench(model, prompt(640, DTYPES[dtype]))
    with record(model, stop=()):  # libraries take memory of their own at their first use
        first.prefill(model)
    bench, peaks = Bench(model, prompt(length, DTYPES[dtype])), []
    bench.prefill(model)
    gc.collect()
    _reset_peak()
    bench.prefill(model)
    peaks.append(_status("VmHWM"))
    gc.collect()
    _reset_peak()
    with record(model, stop=()):
        bench.prefill(model)
    peaks.append(_status("VmHWM"))
    return {"plain": peaks[0], "recorded": peaks[1]}


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the function returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# -- report -----


def show(cost: Cost) -> str:
    mib = 1 << 20
    return (
        f"{cost.dtype}, {cost.prompt} tokens, {cost.layers} layers, {cost.rounds} rounds\n  prefill"
        f"   plain {cost.plain_prefill:6.2f} s   recorded {cost.recorded_prefill:6.2f} s   eager"
        f" with output_attentions {cost.eager_prefill:6.2f} s\n            recorded / plain"
        f" {cost.recorded_over_plain:.3f}   recorded / eager {cost.recorded_over_eager:.3f}\n "
        f" decode    plain {cost.plain_step * 1e3:6.1f} ms   recorded"
        f" {cost.recorded_step * 1e3:6.1f} ms   ratio {cost.step_ratio:.3f}\n  memory    one"
        f" layer's maps {cost.maps / mib:.0f} MiB   recorder at most {cost.own_peak / mib:.1f} MiB,"
        f" {cost.own_over_maps:.1%} of them (kept {cost.kept / mib:.1f} MiB)   eager"
        f" {cost.eager_peak_extra / mib:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of recording at 7B width.")
    parser.add_argument(
        "--quick", action="store_true", help="one layer, 640 tokens, float32, two rounds"
    )
    parser.add_argument(
        "--prompts", type=int, nargs="+", choices=list(PROMPTS), default=[640, 2944]
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layers", type=int, default=3, help="decoder layers (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument(
        "--warmup", type=int, default=1, help="rounds before that, thrown away (default 1)"
    )
    parser.add_argument("--steps", type=int, default=24, help="decode steps per round (default 24)")
    parser.add_argument("--threads", type=int, help="torch threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument(
        "--long", action="store_true", help="only the memory of prompts of 8,128 and 16,192 tokens"
    )
    parser.add_argument("--processor-time", action="store_true", help=PROCESSOR_TIME)
    options = parser.parse_args()
    use_clock(options.processor_time)
    if options.quick:
        options.prompts, options.dtypes, options.layers, options.rounds, options.steps = (
            [640],
            ["float32"],
            1,
            2,
            6,
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = environment() | {"times": "processor" if options.processor_time else "elapsed"}
    print(json.dumps(facts), flush=True)
    if options.long:
        for dtype, length in product(options.dtypes, (8128, 16192)):
            peaks = apart(long_prompt, dtype, length)
            share = peaks["recorded"] / peaks["plain"]
            print(
                f"{dtype}, {length} tokens: {peaks['plain'] >> 20} MiB resident at most in a plain"
                f" prefill, recorded / plain {share:.2f}",
                flush=True,
            )
        return
    costs = []
    for dtype in options.dtypes:
        model = build(options.layers, DTYPES[dtype])
        for length in options.prompts:
            setting, maps = (dtype, options.layers, length), length * length * HEADS * 4
            times = prefills(
                Bench(model, prompt(length, DTYPES[dtype])), options.rounds, options.warmup
            )
            times |= apart(
                decode_steps,
                *setting,
                options.steps,
                options.rounds,
                torch.get_num_threads(),
                options.processor_time,
            )
            sizes = apart(memory, *setting)
            cost = Cost(
                prompt=length,
                dtype=dtype,
                layers=options.layers,
                rounds=options.rounds,
                maps=maps,
                own_over_maps=sizes["own_peak"] / maps,
                **times,
                **sizes,
            )
            costs.append(cost)
            print(show(cost), flush=True)
        del model
        gc.collect()
    if options.out:
        options.out.write_text(
            json.dumps(
                {"environment": environment(), "costs": [asdict(c) for c in costs]}, indent=2
            )
        )


if __name__ == "__main__":
    main()
