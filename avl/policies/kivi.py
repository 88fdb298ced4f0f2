"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from avl.kernels.codes import BITS
from avl.policies.base import Choice, Measure, Policy, sizes
from avl.policies.checks import check_choice, check_count, check_share, warn_if_longer
from avl.policies.prompt import Counts, Prompt
from avl.selection import members


@dataclass(frozen=True, kw_only=True)
class KIVIPolicy(Policy):
    """The full cache in few bits.

    Only the newest keys are in full precision (KIVI, Liu et al., ICML 2024, arXiv 2402.02750).

    Nothing is dropped and everything is attended at every step. Keys are quantised per channel,
    values per token, as quantized_tier.py describes.

    Deviations: after a prompt exactly the newest `newest` keys are in full precision, and while
    decoding older ones are quantised in blocks of 32, so that between `newest` and `newest` + 31
    are (the paper quantises keys whenever 128 are left over, so that between 0 and 127 are, and
    values one by one); a group of the prompt's keys is 128 tokens, not 32.

    Attributes:
        bits: of a stored number: 8, 4 or 2.
        newest: keys that stay in full precision (128 in the paper; 32 in the released example).
    """

    name: ClassVar[str] = "kivi"
    label: ClassVar[str] = "KIVI"
    color_slot: ClassVar[int] = 12

    bits: int = 4
    newest: int = 128

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, BITS, "of a stored number")
        check_count("newest", self.newest, 1, "the newest key is always in full precision")

    @classmethod
    def for_budget(cls, budget: float) -> KIVIPolicy:
        """As many bits as a share of a cache of 16 bits leaves.

        8 from 0.5 on, 4 from 0.25 on, else 2. What is really held also has limits of groups and the
        newest keys.
        """
        check_share("budget", budget)
        return cls(bits=8 if budget >= 0.5 else 4 if budget >= 0.25 else 2)

    @property
    def newest_in_full(self) -> int:
        return self.newest

    def measure(self, prompt: Prompt) -> Measure:
        tokens = [row.tokens for row in prompt.counts]
        warn_if_longer("newest", self.newest, tokens, "nothing of it is quantised")
        return Measure(prompt.layer, prompt.positions, prompt.modality, prompt.positions)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        keys = measure.positions >= 0
        # Number of each key among those of its row, the newest being 0.
        age = keys.flip(-1).long().cumsum(-1).flip(-1) - 1
        newest, older = keys & (age < self.newest), keys & (age >= self.newest)
        return Choice(
            always_attended=[members(newest, max(sizes(newest)))],
            quantized=members(older, max(sizes(older))),
            storage=self.bits,
        )
