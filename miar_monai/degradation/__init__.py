"""How a low-resolution image comes from a high-resolution one, and what follows from that in closed form."""

from miar_monai.degradation.operators import (
    Degradation,
    Degradations,
    Matrices,
    SeparableDegradation,
    SquareDegradation,
    blur_matrix,
    with_blurs,
)

__all__ = [
    "Degradation",
    "Degradations",
    "Matrices",
    "SeparableDegradation",
    "SquareDegradation",
    "blur_matrix",
    "with_blurs",
]
