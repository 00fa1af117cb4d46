"""What figures show."""

from __future__ import annotations

from typing import Any

import numpy as np


def shown_images(figure: Any) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.get_images()]
