"""The degradation of HR to LR images: description, linear operator, and blur estimation."""

from miar_monai.degradation.axis import AxisDegradation, AxisOperator, blur_matrix
from miar_monai.degradation.description import Degradation, operators, with_blurs
from miar_monai.degradation.separable import SeparableOperator

__all__ = [
    "AxisDegradation",
    "AxisOperator",
    "Degradation",
    "SeparableOperator",
    "blur_matrix",
    "operators",
    "with_blurs",
]
