"""Fréchet distances between the features of results and of truths, with intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.paired import jackknife, result_cells
from miar_monai.evaluation.frechet import FeatureMoments, frechet_distance
from miar_monai.evaluation.tables import markdown_table

__all__ = ["EXPLANATION", "TRUTH", "FeatureSets", "Features"]

TRUTH = "truth"

EXPLANATION = """\
Fréchet distance between the features of the results and those of the truths, at the positions inside the body:
AlexNet's, as LPIPS uses it. Each position is a vector: 192 features of 51 × 51 voxels in layer 2, 256 features of
163 × 163 in layer 5. So there are many more vectors than features, but those of one patient are alike: the intervals
are of the jackknife, which leaves out one patient at a time. The distance of the true distribution is above 0, too; it
compares methods in one table only."""

Features = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""See `miar_monai.evaluation.frechet.alexnet_features`."""


class FeatureSets:
    """Collects the features of the truth and of methods, by patient.

    Args:
        features: from images and masks to the feature vectors of each layer.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self.moments: dict[tuple[str, str], dict[str, FeatureMoments]] = {}

    def add(self, estimates: Mapping[str, Tensor], hr: Tensor, body: Tensor, subject: str) -> None:
        """Add some slices of a patient.

        Args:
            estimates: results by method, (N, 1, H, W).
            hr: true slices, (N, 1, H, W).
            body: where features are taken, (N, 1, H, W).
            subject: the patient.
        """
        for name, images in {TRUTH: hr, **estimates}.items():
            known = self.moments.setdefault((name, subject), {})
            for layer, vectors in self.features(images, body).items():
                found = FeatureMoments.of(vectors)
                known[layer] = known[layer] + found if layer in known else found

    def distances(self, layer: str, method: str) -> tuple[float, list[float]]:
        """Return the distance of a method to the truth in one layer, and the same without each patient in turn."""
        patients = [patient for name, patient in self.moments if name == method]
        sets = [[self.moments[name, patient][layer] for patient in patients] for name in (method, TRUTH)]
        totals = [sum(rest, first) for first, *rest in sets]
        without = [
            frechet_distance(*(total - one[i] for total, one in zip(totals, sets, strict=True)))
            for i in range(len(patients))
            if len(patients) > 1
        ]
        return frechet_distance(*totals), without

    def table(self, ours: str) -> str:
        """Return, in Markdown, the distance of each method, and how much it is above that of one of them.

        Args:
            ours: the method whose distance is subtracted.
        """
        cells = []
        methods = [name for name in dict.fromkeys(name for name, _ in self.moments) if name != TRUTH]
        for layer in next(iter(self.moments.values())):
            found = {method: self.distances(layer, method) for method in methods}
            estimate, without = found[ours]
            for method, (other, others) in found.items():
                row = result_cells(method, layer, jackknife(other, others), 2, sign="")
                more = jackknife(other - estimate, [a - b for a, b in zip(others, without, strict=True)])
                difference = result_cells(method, layer, more, 2)[2:4] if method != ours else ("", "")
                cells.append((*row[:4], *difference, row[-1]))
        titles = ("method", "features", "distance", "jackknife", f"minus {ours}", "jackknife", "patients")
        return markdown_table(titles, cells)
