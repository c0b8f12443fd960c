"""A measure: how colourful the generated images are, beside how colourful real ones are.

toolkit --plugin plugins/examples/colourfulness.py study run STUDY.yaml
"""

import numpy as np

from toolkit import ClipSet, Measure, hookimpl


def colourfulness(real: ClipSet, fake: ClipSet) -> float:
    """Hasler & Süsstrunk 2003, eq. 9, over all generated frames: 0 is grey, 100 extremely colourful."""
    r, g, b = np.moveaxis(fake.frames.astype(np.float64), -1, 0)
    red_green, yellow_blue = r - g, (r + g) / 2 - b
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


@hookimpl
def toolkit_metrics() -> list[Measure]:
    return [Measure("colourfulness", colourfulness, better="real", reference="Hasler & Süsstrunk 2003, eq. 9")]
