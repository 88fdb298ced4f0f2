"""Attention and cache time of a decode step: stock cache, FullPolicy, A-VL masked, sliced, and as
it is here, and the preset that keeps image keys in 4 bits.

    python tests/benchmarks/decoding.py                  # everything: about half an hour on 2 cores
    python tests/benchmarks/decoding.py --quick          # one small setting, to see that it runs
    python tests/benchmarks/decoding.py --out decoding.json

A LLaVA of 7B width (32 heads of 128) or of a grouped-query width (8 key/value heads), few layers,
random weights. For "attention + cache" the projections and the MLP are stand-ins that return ready
random tensors, the same for every variant, so that what is timed is: the cache's update, the
attention function with everything the policy does in it, and the policy's work before and after the
pass. "whole step" puts the real layers back. All variants take every step in turn, so that they
share whatever else the machine does; times are medians over steps of a kind, averaged over a
refresh cycle, per layer. Random queries make the core change far more between refreshes than a
trained model does, which is against A-VL. Before times are shown, the three ways of doing A-VL are
checked to give the same outputs, and the preset to give nearly those of the stock cache.

"x stock" are the times divided by the stock cache's; they compare what ran in turn, so that a busy
machine changes them less than the times. The limit is the time in which the attended keys and
values (of the preset: the bytes it holds) could be copied at the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import avl
from avl.hooks import attached
from avl.quantized_tier import QuantizedTier
from tests.benchmarks.machine import PROCESSOR_TIME, environment
from tests.benchmarks.variants import MaskedStep, SlicedStep, kv_bytes

CLOCK: Callable[[], float] = time.perf_counter
IMAGE, SYSTEM, QUESTION = 5, 17, 47
POLICY = avl.AdaptivePolicy()
PRESET = avl.AdaptivePolicy.with_cold_tier()
CODED_ERROR = 0.2
"""Most that the preset's outputs may differ from the stock cache's, as a share of their length;
random keys and values, which 4 bits keep worse than a trained model's, are about half of that off.
"""
VARIANTS = ("stock", "full", "masked", "sliced", "avl", "preset")


@dataclass(frozen=True)
class Setting:
    """One row of the table: 7B width with `kv_heads` key/value heads, `images` pictures in the
    prompt.
    """

    kv_heads: int
    images: int
    batch: int
    dtype: str
    device: str = "cpu"
    heads: int = 32
    width: int = 128
    grid: int = 24
    layers: int = 2

    @property
    def tokens(self) -> int:
        return SYSTEM + self.images * self.grid**2 + QUESTION


@dataclass
class Result:
    """Per layer: milliseconds of attention + cache and of the whole step, bytes filled and
    allocated; keys attended.
    """

    setting: Setting
    attention_ms: dict[str, float] = field(default_factory=dict)
    ordinary_ms: dict[str, float] = field(default_factory=dict)
    refresh_ms: dict[str, float] = field(default_factory=dict)
    whole_ms: dict[str, float] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)
    limit_ms: dict[str, float] = field(default_factory=dict)
    prompt_ms: float = 0.0
    storing_ms: float = 0.0


def build(setting: Setting) -> LlavaForConditionalGeneration:
    """A random LLaVA with a tiny vision tower that makes the right number of image tokens."""
    hidden = setting.heads * setting.width
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        head_dim=setting.width,
        num_hidden_layers=setting.layers,
        vocab_size=64,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_hidden_layers=1,
        image_size=4 * setting.grid,
    )
    vision.patch_size = 4
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    with torch.device(setting.device):
        return LlavaForConditionalGeneration(config).to(dtype).eval()


class StandIn(nn.Module):
    """Returns ready tensors instead of computing them: random ones of the right width, or its
    input.
    """

    def __init__(self, seed: int, width: int | None) -> None:
        super().__init__()
        self.seed, self.width, self.calls = seed, width, 0
        self.seen: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.width is None:
            self.seen = hidden[:, -1]
            return hidden
        self.calls += 1
        generator = torch.Generator(hidden.device).manual_seed(self.seed * 1000 + self.calls)
        shape = (*hidden.shape[:2], self.width)
        return torch.randn(shape, generator=generator, dtype=hidden.dtype, device=hidden.device)


class Runner:
    """One variant: its own modules over shared weights, its cache, and a stopwatch."""

    def __init__(self, name: str, model: LlavaForConditionalGeneration, setting: Setting) -> None:
        self.name, self.setting = name, setting
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.stack = ExitStack()
        self.session: Any = None
        self.seconds = 0.0
        self._running = False
        self._real: list[tuple[nn.Module, str, nn.Module]] = []
        self._stands: list[tuple[nn.Module, str, nn.Module]] = []
        config = self.model.config.text_config
        for index, layer in enumerate(self.model.model.language_model.layers):
            heads, keys, width = (
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
            )
            for place, part, size in (
                (layer.self_attn, "q_proj", heads * width),
                (layer.self_attn, "k_proj", keys * width),
                (layer.self_attn, "v_proj", keys * width),
                (layer.self_attn, "o_proj", None),
                (layer, "mlp", None),
            ):
                stand = StandIn(len(self._stands) + 10 * index, size)
                self._real.append((place, part, getattr(place, part)))
                self._stands.append((place, part, stand))
        self.cache = DynamicCache(config=config)

    def start(self) -> None:
        if self.name == "full":
            self.session = self.stack.enter_context(avl.adaptive(self.model, avl.FullPolicy()))
        elif self.name == "avl":
            self.session = self.stack.enter_context(avl.adaptive(self.model, POLICY))
        elif self.name == "preset":
            self.session = self.stack.enter_context(avl.adaptive(self.model, PRESET))
        elif self.name != "stock":
            self.session = {"masked": MaskedStep, "sliced": SlicedStep}[self.name](POLICY)
            self.stack.enter_context(attached(self.model, self.session))
        self.use(self._stands)

    def use(self, modules: list[tuple[nn.Module, str, nn.Module]]) -> None:
        for place, part, module in modules:
            setattr(place, part, module)

    def prompt(self, ids: Tensor, pixels: Tensor) -> None:
        with torch.no_grad():
            self.model(
                input_ids=ids, pixel_values=pixels, past_key_values=self.cache, logits_to_keep=1
            )

    def fresh_prompt(self, ids: Tensor, pixels: Tensor) -> None:
        """A prompt with a cache of its own, which is thrown away."""
        cache, self.cache = self.cache, DynamicCache(config=self.model.config.text_config)
        self.prompt(ids, pixels)
        self.cache = cache

    def step(self, token: Tensor) -> float:
        """Run a decode step; returns the seconds it took as a whole."""
        self.synchronize()
        begin = CLOCK()
        with torch.no_grad():
            self.model(input_ids=token, past_key_values=self.cache, logits_to_keep=1)
        self.synchronize()
        return CLOCK() - begin

    def synchronize(self) -> None:
        if self.setting.device != "cpu":
            torch.cuda.synchronize()

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to `seconds`, calls inside calls counted once."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            self.synchronize()
            begin = CLOCK()
            try:
                return function(*args, **kwargs)
            finally:
                self.synchronize()
                self.seconds += CLOCK() - begin
                self._running = False

        return wrapper

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Time the cache, the attention function, and the policy's begin and end."""
        registered = "sdpa" if self.name == "stock" else "avl_sdpa"
        original = ALL_ATTENTION_FUNCTIONS[registered]
        ALL_ATTENTION_FUNCTIONS.register(registered, self.timed(original))
        self.cache.update = self.timed(self.cache.update)  # type: ignore[method-assign]
        if self.session is not None:
            self.session.begin, self.session.end = (
                self.timed(self.session.begin),
                self.timed(self.session.end),
            )
        try:
            self.seconds = 0.0
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS.register(registered, original)
            del self.cache.update
            if self.session is not None:
                del self.session.begin, self.session.end

    def output(self) -> Tensor:
        """What the last layer's attention gave, last row."""
        seen = next(m for _, part, m in reversed(self._stands) if part == "o_proj").seen
        assert seen is not None
        return seen.float()


def measure(setting: Setting, cycles: int, whole_cycles: int) -> Result:
    """All variants through one setting, step by step in turn."""
    model = build(setting)
    runners = [Runner(name, model, setting) for name in VARIANTS]
    result = Result(setting)
    ids = torch.tensor(
        [[9] * SYSTEM + [IMAGE] * (setting.tokens - SYSTEM - QUESTION) + [11] * QUESTION]
    )
    ids = ids.expand(setting.batch, -1).to(setting.device)
    generator = torch.Generator().manual_seed(1)
    side = 4 * setting.grid
    pixels = torch.randn(setting.images * setting.batch, 3, side, side, generator=generator)
    pixels = pixels.to(setting.device, model.dtype)
    token = torch.full((setting.batch, 1), 12, device=setting.device)
    every = POLICY.refresh_every
    try:
        for runner in runners:
            runner.start()
            runner.prompt(ids, pixels)
        times: dict[str, dict[bool, list[float]]] = {
            name: {True: [], False: []} for name in VARIANTS
        }
        for step in range(1, every * (cycles + 1) + 1):
            for runner in runners[step % len(runners) :] + runners[: step % len(runners)]:
                with runner.clock():
                    runner.step(token)
                if step > every:  # the first cycle warms up
                    times[runner.name][step % every == 0].append(runner.seconds / setting.layers)
            check(runners)
        for name, kinds in times.items():
            ordinary, refresh = (1e3 * statistics.median(kinds[kind]) for kind in (False, True))
            result.ordinary_ms[name], result.refresh_ms[name] = ordinary, refresh
            result.attention_ms[name] = (ordinary * (every - 1) + refresh) / every
        for runner in runners:
            result.filled[runner.name], result.allocated[runner.name] = bytes_of(runner)
        whole(runners, token, whole_cycles * every, result)
        limits(result)
        if setting.batch == 1:
            prompts(runners, ids, pixels, result)
    finally:
        for runner in runners:
            runner.stack.close()
    return result


def whole(runners: list[Runner], token: Tensor, steps: int, result: Result) -> None:
    """Whole decode steps with the real projections and MLP."""
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for runner in runners:
        runner.use(runner._real)
    for number in range(steps + 1):
        for runner in runners:
            seconds = runner.step(token)
            if number:
                times[runner.name].append(1e3 * seconds / result.setting.layers)
    result.whole_ms = {name: statistics.mean(values) for name, values in times.items()}


def prompts(runners: list[Runner], ids: Tensor, pixels: Tensor, result: Result) -> None:
    """What the preset takes to store a prompt's image keys, and what the stock prompt takes.

    Projections and MLP are the real ones in the latter only.
    """
    preset, stock = (next(r for r in runners if r.name == name) for name in ("preset", "stock"))
    original, spent = QuantizedTier.hold, [0.0]

    def timed(*arguments: Any) -> QuantizedTier:
        begin = CLOCK()
        tier = original(*arguments)
        preset.synchronize()
        spent[0] += CLOCK() - begin
        return tier

    QuantizedTier.hold = timed  # type: ignore[method-assign,assignment]
    preset.use(preset._stands)
    try:
        preset.fresh_prompt(ids, pixels)
    finally:
        QuantizedTier.hold = original  # type: ignore[method-assign]
    stock.use(stock._real)
    begin = CLOCK()
    stock.fresh_prompt(ids, pixels)
    stock.synchronize()
    result.prompt_ms = 1e3 * (CLOCK() - begin) / result.setting.layers
    result.storing_ms = 1e3 * spent[0] / result.setting.layers


def check(runners: list[Runner]) -> None:
    """The ways of doing A-VL agree, and so do the ways of doing nothing."""
    outputs = {runner.name: runner.output() for runner in runners}
    tolerance = 1e-3 if runners[0].setting.dtype == "float32" else 5e-2
    for one, other in (("stock", "full"), ("avl", "masked"), ("avl", "sliced")):
        if (difference := float((outputs[one] - outputs[other]).abs().max())) > tolerance:
            raise AssertionError(
                f"{one} and {other} differ by {difference:.2e}; nothing measured here would mean"
                " much"
            )
    error = outputs["preset"] - outputs["stock"]
    share = float(error.norm() / outputs["stock"].norm())
    if not share < CODED_ERROR:
        raise AssertionError(
            f"the preset's outputs are {share:.1%} off the stock cache's; nothing measured here"
            " would mean much"
        )


def bytes_of(runner: Runner) -> tuple[int, int]:
    """Bytes of keys and values per layer, filled and allocated."""
    if runner.name in ("full", "avl", "preset"):
        usage = runner.session.usage()
        return usage.filled // runner.setting.layers, usage.allocated // runner.setting.layers
    return (kv_bytes(runner.cache) // runner.setting.layers,) * 2


def bandwidth(dtype: torch.dtype, device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.ones(2**26, dtype=dtype, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = CLOCK()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(CLOCK() - begin)
    return 2 * source.nbytes / min(times)


def limits(result: Result) -> None:
    """Milliseconds in which the attended keys and values could be copied, averaged over a cycle."""
    setting, every = result.setting, POLICY.refresh_every
    speed = bandwidth(getattr(torch, setting.dtype), setting.device)
    image = setting.images * setting.grid**2
    text = SYSTEM + QUESTION
    size = (
        2
        * setting.batch
        * setting.kv_heads
        * setting.width
        * getattr(torch, setting.dtype).itemsize
    )
    assert POLICY.core is not None
    assert POLICY.secondary is not None
    core = ((every - 1) * int(POLICY.core * image) + int(POLICY.secondary * image)) / every
    for name in VARIANTS:
        keys = image + text if name in ("stock", "full") else core + text
        result.limit_ms[name] = 1e3 * keys * size / speed
    result.limit_ms["preset"] = 1e3 * result.filled["preset"] / speed


def settings(arguments: argparse.Namespace) -> list[Setting]:
    if arguments.quick:
        return [Setting(8, 1, 1, "float32", arguments.device, heads=8, width=64, layers=1)]
    return [
        Setting(kv_heads, images, batch, dtype, arguments.device, layers=arguments.layers)
        for dtype in arguments.dtype
        for kv_heads in arguments.kv_heads
        for images in arguments.images
        for batch in arguments.batch
    ]


def show(result: Result) -> None:
    s = result.setting
    heads = f"{s.heads} query and {s.kv_heads} key/value heads of {s.width}"
    print(f"\n{s.tokens} tokens, batch {s.batch}, {heads}, {s.dtype}")
    print(
        f"  {'':8}{'attention+cache ms':>19}{'x stock':>9}{'ordinary':>10}{'refresh':>9}"
        f"{'limit':>8}{'whole ms':>10}{'x stock':>9}{'filled':>9}{'allocated':>11}"
    )
    for name in VARIANTS:
        stock = result.attention_ms["stock"], result.whole_ms["stock"], result.filled["stock"]
        print(
            f"  {name:8}{result.attention_ms[name]:19.3f}"
            f"{result.attention_ms[name] / stock[0]:9.2f}"
            f"{result.ordinary_ms[name]:10.3f}{result.refresh_ms[name]:9.3f}"
            f"{result.limit_ms[name]:8.3f}"
            f"{result.whole_ms[name]:10.2f}{result.whole_ms[name] / stock[1]:9.2f}"
            f"{result.filled[name] / stock[2]:9.2f}{result.allocated[name] / stock[2]:11.2f}"
        )

    if result.prompt_ms:
        share = result.storing_ms / result.prompt_ms
        print(
            f"  storing the preset's keys {result.storing_ms:.0f} ms a layer, {share:.1%} of the"
            f" layer's prompt in the stock model ({result.prompt_ms:.0f} ms)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small setting")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument(
        "--cycles", type=int, help="refresh cycles to time (default 10; 3 with --quick)"
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[32, 8])
    parser.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[1, 5],
        help="pictures of 576 tokens: 640, 2944 tokens",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    parser.add_argument("--processor-time", action="store_true", help=PROCESSOR_TIME)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    arguments = parser.parse_args()
    if arguments.processor_time:
        global CLOCK
        CLOCK = time.process_time
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = {**environment(arguments.device), "policy": repr(POLICY), "preset": repr(PRESET)}
    facts["times"] = "of the processor" if arguments.processor_time else "elapsed"
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    results = []
    for setting in settings(arguments):
        cycles = arguments.cycles or (3 if arguments.quick else 10)
        results.append(measure(setting, cycles, 1 if arguments.quick else 2))
        show(results[-1])
        sys.stdout.flush()
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=1)
        )


if __name__ == "__main__":
    main()
