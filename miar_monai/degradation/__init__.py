"""The degradation of HR to LR images: description, linear operator, and blur estimation."""

from miar_monai.degradation.axis import AxisDegradation, AxisOperator, blur_matrix
from miar_monai.degradation.description import Degradation, operators, with_blurs
from miar_monai.degradation.family import (
    Member,
    OperatorFamily,
    in_plane_degradations,
    through_plane_degradations,
)
from miar_monai.degradation.separable import SeparableOperator

__all__ = [
    "AxisDegradation",
    "AxisOperator",
    "Degradation",
    "Member",
    "OperatorFamily",
    "SeparableOperator",
    "blur_matrix",
    "in_plane_degradations",
    "operators",
    "through_plane_degradations",
    "with_blurs",
]
