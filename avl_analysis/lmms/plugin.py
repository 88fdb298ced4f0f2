"""Models of lmms-eval that answer under a policy: `--model avl_llava_hf --model_args policy=a-vl`.

Registered through the entry point group `lmms_eval.models`. Each class is lmms-eval's own wrapper
with a mix-in in front, made when it is first asked for, because most wrappers import packages of
their own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from avl_analysis.evaluation.policy_files import named_policy
from avl_analysis.lmms.tally import Tally
from avl_analysis.models.loading import VLM

WRAPPERS = {
    "llava_hf": ("lmms_eval.models.chat.llava_hf", "LlavaHf"),
    "qwen2_5_vl": ("lmms_eval.models.chat.qwen2_5_vl", "Qwen2_5_VL"),
    "qwen3_vl": ("lmms_eval.models.chat.qwen3_vl", "Qwen3_VL"),
    "internvl_hf": ("lmms_eval.models.chat.internvl_hf", "InternVLHf"),
    "huggingface": ("lmms_eval.models.chat.huggingface", "Huggingface"),
}
"""Model of lmms-eval -> module and class of its chat wrapper (lmms-eval 0.7.3)."""
PREFIX = "avl_"
STOCK = "none"
"""Name that leaves the model with its stock cache."""


class PolicyMixin:
    """Takes `policy` out of the model's arguments and answers every request under it."""

    def __init__(self, policy: str = STOCK, **arguments: Any) -> None:
        # Commas separate model arguments, so settings of a policy must come from a JSON file.
        self.policy = None if policy == STOCK else named_policy(str(policy))
        super().__init__(**arguments)
        self._check_policy()

    def _check_policy(self) -> None:
        """Answer one grey picture, so that a policy that cannot work fails before the benchmark."""
        # Wrappers keep their processor under one of two names.
        own = getattr(self, "processor", None)
        processor = own or self._image_processor  # type: ignore[attr-defined]
        model = self.model  # type: ignore[attr-defined]
        vlm = VLM("lmms-eval", model, processor, "", None, "")
        inputs = vlm.prepare(np.full((64, 64, 3), 128, np.uint8), "What is this?")
        with Tally(model, self.policy) as tally:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        tally.check(1)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answers to the requests, as the wrapper gives them; raises if one of them failed."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        with Tally(self.model, self.policy) as tally:  # type: ignore[attr-defined]
            answers = super().generate_until(requests)  # type: ignore[misc]
        # The wrapper may have swallowed an exception of `generate`; this raises it.
        tally.check(len(requests))
        # The zeros are lmms-eval's own totals of time, tokens and speed, which a tally does not
        # give.
        log_metrics(0.0, 0, 0.0, additional_metrics=tally.summary())
        return list(answers)


def manifests() -> list[Any]:
    """What lmms-eval's registry asks its entry points for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(PREFIX + name, chat_class_path=f"{__name__}.{name}") for name in WRAPPERS]


def __getattr__(name: str) -> Any:
    """The class of one wrapper with the mix-in, under the name of lmms-eval's model."""
    if name not in WRAPPERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, wrapper = WRAPPERS[name]
    # The mix-in comes first, so that its methods are found before the wrapper's and can call them.
    made = type(name, (PolicyMixin, getattr(import_module(module), wrapper)), {"is_simple": False})
    # lmms-eval imports the class by this module and name; kept in the module's globals, it is made
    # once.
    made.__module__ = __name__
    globals()[name] = made
    return made
