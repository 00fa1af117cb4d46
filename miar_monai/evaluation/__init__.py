"""Quality of super-resolved slices: metrics, and their values by slice, patient and contrast."""

from miar_monai.evaluation.handler import EvaluationHandler
from miar_monai.evaluation.page import SlicePictures, write_results_page
from miar_monai.evaluation.slices import SuperResolutionEvaluation
from miar_monai.evaluation.tables import MILLISECONDS, Row, by_contrast, markdown_table

__all__ = [
    "MILLISECONDS",
    "EvaluationHandler",
    "Row",
    "SlicePictures",
    "SuperResolutionEvaluation",
    "by_contrast",
    "markdown_table",
    "write_results_page",
]
