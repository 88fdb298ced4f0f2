"""What a policy costs and saves, counted physically.

Bytes of buffers, keys read, against the stock cache.

Everything allocated is counted, slack and empty slots too; keys and values apart from bookkeeping
(positions, scores). The yardstick is what `transformers`' DynamicCache holds after the same tokens:
every position of every row, padding included, which it stores as well. A quantised tier counts with
what is stored of it: codes, scales, or whole keys; so do the bounds of pages of keys. What lies in
host memory while the model runs elsewhere is counted apart, as `host`. Only the layers a policy
acts on are counted; sliding-window and linear layers of hybrid models keep their own caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl.buffer import BufferSizes
from avl.cache import AdaptiveLayer
from avl.kernels import backend_for


@dataclass(frozen=True)
class StepUsage:
    """One pass through the decoder.

    Attributes:
        step: 0 for a prompt (a later turn's prompt has the number of the step before it), then 1,
            2, ...
        seen: tokens per row seen so far, padding included.
        attended: keys that each row's newest token attended to; one tuple over rows per layer.
        held: keys (per key/value head; their mean, rounded down, where heads differ) that each row
            held after the pass; likewise.
        filled: bytes of keys and values in use after the pass on the model's device, all layers.
        allocated: bytes of all key and value buffers on the model's device after the pass.
        host: bytes of keys and values in host memory, where that is not the model's device.
        by_row: bytes of keys and values in use by each row of the batch, wherever they lie.
        bookkeeping: bytes of positions and scores.
        full: bytes the stock cache would hold.
    """

    step: int
    seen: int
    attended: tuple[tuple[int, ...], ...]
    held: tuple[tuple[int, ...], ...]
    filled: int
    allocated: int
    bookkeeping: int
    full: int
    host: int = 0
    by_row: tuple[float, ...] = ()


@dataclass(frozen=True, repr=False)
class Usage:
    """Cost of the latest conversation under a policy.

    Attributes:
        layers: indices of the layers counted.
        steps: one record per pass, the prompt first.
        peak: most bytes of keys and values at any moment, the prompt's own keys while it ran
            included.
        kernels: which version of the kernels attends to keys in few bits (`avl.kernels`): "numba"
            or "torch"; empty where no keys are in few bits.
    """

    layers: tuple[int, ...]
    steps: tuple[StepUsage, ...]
    peak: int
    kernels: str = ""

    def __repr__(self) -> str:
        decoded = sum(step.step > 0 for step in self.steps)
        return (
            f"<Usage after {decoded} decode step(s), {len(self.layers)} layers:"
            f" {self.filled:,} of {self.full:,} bytes in use ({self.filled_share:.0%}),"
            f" {self.attended_share:.0%} of the keys read per step>"
        )

    def _repr_html_(self) -> str:
        rows = {
            "bytes in use": f"{self.filled:,} ({self.filled_share:.1%} of the full cache's)",
            "bytes allocated": f"{self.allocated:,} ({self.allocated_share:.1%})",
            "bytes of the full cache": f"{self.full:,}",
            "bookkeeping bytes": f"{self.bookkeeping:,}",
            "most bytes at any moment": f"{self.peak:,}",
            "keys read per decode step": f"{self.attended_share:.1%} of those seen",
            "passes": str(len(self.steps)),
        }
        cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows.items())
        return f"<table>{cells}</table>"

    @property
    def filled(self) -> int:
        """Bytes of keys and values in use at the end."""
        return self.steps[-1].filled

    @property
    def allocated(self) -> int:
        """Bytes of key and value buffers at the end."""
        return self.steps[-1].allocated

    @property
    def bookkeeping(self) -> int:
        """Bytes of positions and scores at the end."""
        return self.steps[-1].bookkeeping

    @property
    def host(self) -> int:
        """Bytes of keys and values in host memory at the end.

        Only where that is not the model's device.
        """
        return self.steps[-1].host

    @property
    def full(self) -> int:
        """Bytes the stock cache would hold at the end."""
        return self.steps[-1].full

    @property
    def filled_share(self) -> float:
        """Filled bytes / stock bytes at the end."""
        return self.filled / self.full

    @property
    def allocated_share(self) -> float:
        """Allocated bytes / stock bytes at the end."""
        return self.allocated / self.full

    @property
    def attended_share(self) -> float:
        """Keys attended / keys seen, mean over decode steps, layers and rows.

        1.0 before the first decode step.
        """
        decoded = [step for step in self.steps if step.step > 0]
        shares = [keys / step.seen for step in decoded for layer in step.attended for keys in layer]
        return sum(shares) / len(shares) if shares else 1.0


@dataclass(eq=False)
class _Pass:
    """A pass as it was written down; `StepUsage` has what is worked out from it.

    Attributes:
        step: as in `StepUsage`.
        attended: by layer, keys each row attended to.
        seen: by layer, tokens that passed.
        sizes: by layer, what returns its sizes after the pass.
        device: of the first layer.
    """

    step: int
    attended: Sequence[Sequence[int]]
    seen: list[int]
    sizes: list[Callable[[], BufferSizes]]
    device: torch.device


@dataclass(eq=False)
class UsageLog:
    """Writes down every pass of one conversation; `usage` makes the record."""

    layers: tuple[int, ...]
    peak: int = 0
    kernels: str = ""
    _steps: list[StepUsage] = field(default_factory=list)
    _passes: list[_Pass] = field(default_factory=list)  # that are not among the steps yet

    def hold(self, layers: Iterable[AdaptiveLayer], passing: Iterable[Tensor]) -> None:
        """Note a moment at which `passing` tensors exist beside the layers' buffers."""
        # Layers that still wait for their policy's choice have no buffer; their keys are among
        # `passing`.
        buffers = [layer.buffer for layer in layers if layer.buffer is not None]
        allocated = sum(buffer.bytes_allocated() for buffer in buffers)
        self.peak = max(self.peak, allocated + sum(tensor.nbytes for tensor in passing))

    def write(
        self, step: int, layers: Sequence[AdaptiveLayer], attended: Sequence[Sequence[int]]
    ) -> None:
        """Note the end of a pass.

        Args:
            step: number of the decode step, 0 for a prompt.
            layers: those that are counted, all filled.
            attended: keys each row attended to, by layer.
        """
        # Sums are left for later: taken at every step they cost as much as a layer's attention.
        buffers = [layer.filled_buffer for layer in layers]
        self._passes.append(
            _Pass(
                step,
                attended,
                [layer.seen for layer in layers],
                [buffer.sizes_later() for buffer in buffers],
                layers[0].device,
            )
        )

    @property
    def empty(self) -> bool:
        """Whether there was no pass yet."""
        return not self._steps and not self._passes

    def usage(self) -> Usage:
        """The record of all passes so far."""
        for one in self._passes:
            sizes = [size() for size in one.sizes]
            allocated = sum(size.allocated for size in sizes)
            self.peak = max(self.peak, allocated)
            self.kernels = backend_for(one.device) if any(s.coded for s in sizes) else ""
            # The stock cache holds a key and a value of every position seen, padding included, in
            # the model's own precision.
            full = sum(n * size.position for n, size in zip(one.seen, sizes, strict=True))
            self._steps.append(
                StepUsage(
                    step=one.step,
                    seen=max(one.seen),
                    attended=tuple(map(tuple, one.attended)),
                    held=tuple(tuple(size.held) for size in sizes),
                    filled=sum(size.in_use for size in sizes),
                    allocated=allocated,
                    bookkeeping=sum(size.bookkeeping for size in sizes),
                    full=full,
                    host=sum(size.host for size in sizes),
                    # From layers x rows to rows x layers.
                    by_row=tuple(map(sum, zip(*[size.by_row for size in sizes], strict=True))),
                )
            )
        self._passes.clear()
        return Usage(self.layers, tuple(self._steps), self.peak, self.kernels)
