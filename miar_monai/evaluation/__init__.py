"""Quality of super-resolved slices: metrics, and their values by slice, patient and contrast."""

from miar_monai.evaluation.slices import MILLISECONDS, EvaluationHandler, Row, SuperResolutionEvaluation, by_contrast

__all__ = ["MILLISECONDS", "EvaluationHandler", "Row", "SuperResolutionEvaluation", "by_contrast"]
