"""Which image tokens of a question about a drawn scene lie on something that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from avl.families import describe
from avl.tokens import Modality
from avl_analysis import scenes
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.regions import Region, boxes_of, on_tokens
from avl_analysis.models.loading import VLM
from avl_analysis.models.videos import is_video
from avl_analysis.recordings.image_tokens import ImageTokens


def object_tokens(vlm: VLM, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Per question (image tokens,): 1 on an object or a character, 0 on the ground, NaN unknown.

    Args:
        vlm: a loaded model.
        samples: questions of one batch; only drawn scenes shown as one picture are known.
    """
    family = describe(vlm.model)
    inputs = vlm.prepare([list(one.images) for one in samples], [one.prompt for one in samples])
    layout = family.layout(inputs["input_ids"], inputs.get("attention_mask"), inputs)
    is_image = (layout.modality == Modality.IMAGE).cpu()
    counts = is_image.sum(1).tolist()
    found = [np.full(count, np.nan) for count in counts]
    drawn = [
        sample.scene is not None and len(sample.images) == 1 and not is_video(sample.images[0])
        for sample in samples
    ]
    if not all(drawn):  # a batch is of one kind of question, or of a person's own pictures
        return found
    sizes = [[(scenes.drawing.SIDE, scenes.drawing.SIDE)] for _ in samples]
    boxes = family.picture_map(layout, inputs, sizes, vlm.processor).boxes
    for row, sample in enumerate(samples):
        assert sample.scene is not None
        number = np.arange(counts[row])
        places = boxes[row].cpu()[is_image[row]].double().numpy()
        places = places / scenes.drawing.SIDE  # picture maps are in pixels
        image = ImageTokens(number, number, places, np.zeros(counts[row], np.int64))
        if not image.placed:
            continue
        facts = sample.scene
        scene = scenes.generate(int(facts["seed"]), int(facts["index"]), facts["task"]).scene
        parts: list[Any] = [*scene.things, *([scene.text] if scene.text else [])]
        patches = sorted({int(patch) for part in parts for patch in part.patches})
        region = Region(boxes_of([part.box for part in parts]), tuple(patches))
        found[row][:] = 0.0
        found[row][list(on_tokens(region, image).tokens)] = 1.0
    return found
