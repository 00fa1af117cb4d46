"""Scans of results by Fourier ring correlation: the shares of labelled patches by patient, and an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.frechet import TRUTH
from benchmarks.paired import EXPLANATION, INTERVALS, level, paired, pairs, result_cells
from miar_monai.errors import check_range
from miar_monai.evaluation import Row
from miar_monai.evaluation.ring_correlation import (
    CUTOFF,
    PATCH_SIDE,
    THRESHOLD,
    CorrelationScan,
    patch_starts,
    patches_within,
)
from miar_monai.evaluation.tables import markdown_table
from miar_monai.visualize.figures import marked_panels

__all__ = ["CEILING", "FLOOR", "Example", "Limits", "Scans"]

FLOOR, CEILING = "linear inverse", "mirrored detail"
"""The controls: a result that has no detail of its own, and one that has the detail of another image."""
CUTOFFS = (0.25, 0.4, 0.5)  # besides the one that is chosen
KINDS = ("labelled", "invented")
COLORS = {"missing": "deepskyblue", "invented": "orange"}  # the last are drawn on top
_DEFINITIONS = """\
Patches of {side} × {side} voxels that overlap by half, with at least half their voxels in the body. The Fourier ring
correlation (FRC) of a patch with the truth is that under a Hann window, without the mean of the patch, in network
intensities. **Labelled** are the patches whose correlation falls below {threshold:g} before {cutoff:g} of the Nyquist
frequency (sFRC, Kc et al. 2026); the Nyquist frequency of the input is at {input:g}. The authors choose these limits by
annotated hallucinations; there are none here, so the default limits are those of their 4× super-resolution of CT, and
two controls show what they mean. sFRC does not tell missing detail from invented detail: blur alone is labelled, as in
the row "{floor}". **Invented** are the labelled patches in which the power of the result, at the frequency where the
correlation is lost, is at least half that of the truth. The row "{floor}", which has no detail of its own, is the floor
of this share: aliasing is taken for detail. So is noise, where a patch has no structure. The row "{ceiling}" has the
detail of the truth turned over from left to right, corrected so that it explains the input: all of it is false."""


class Limits(NamedTuple):
    """Settings of the scan."""

    side: int = PATCH_SIDE
    threshold: float = THRESHOLD
    cutoff: float = CUTOFF

    def check(self) -> None:
        """Check the ranges.

        Raises:
            SettingError: if a setting is out of range.
        """
        check_range("patch_side", self.side, 4, float("inf"))
        check_range("threshold", self.threshold, 0, 1)
        check_range("cutoff", self.cutoff, 0, 1)

    def column(self, kind: str, cutoff: float | None = None) -> str:
        """Return the column of one of the `KINDS`, in percent of the patches; for another cutoff, if it is given."""
        return f"{kind} below {self.cutoff if cutoff is None else cutoff:g} (%)"


class Example(NamedTuple):
    """A slice with its patches."""

    count: int
    """Number of invented patches."""
    note: str
    images: Mapping[str, Tensor]
    """The truth and the results, (H, W)."""
    squares: Mapping[str, Mapping[str, list[tuple[int, int]]]]
    """Lower corners of the middle of the labelled patches, by method and color; these quarters do not overlap."""


class Scans:
    """Scans the slices of methods, and collects the shares of labelled patches.

    Args:
        limits: settings of the scan.
        shown: method whose slice with most invented patches becomes the example.
    """

    def __init__(self, limits: Limits, shown: str) -> None:
        self.limits = limits
        self.shown = shown
        self.rows: list[Row] = []
        self.example = Example(-1, "", {}, {})

    def add(
        self,
        estimates: Mapping[str, Tensor],
        hr: Tensor,
        body: Tensor,
        subject: str,
        slices: Sequence[int],
        contrast: str | None = None,
    ) -> None:
        """Scan some slices of a volume.

        Args:
            estimates: results by method, (N, 1, H, W).
            hr: true slices, (N, 1, H, W).
            body: mask, (N, 1, H, W).
            subject: the patient.
            slices: index of each slice.
            contrast: contrast of the volume, if the data set has several.
        """
        side, threshold, cutoff = self.limits
        within = patches_within(body, side)  # (N, rows, columns)
        scans = {name: CorrelationScan.of(sr, hr, side, threshold) for name, sr in estimates.items()}
        volume = {"subject": subject, "contrast": contrast} if contrast else {"subject": subject}
        for name, scan in scans.items():
            shares = {
                self.limits.column(kind, limit): _percent(getattr(scan, kind)(limit), within)
                for limit in sorted({*CUTOFFS, cutoff})
                for kind in KINDS
            }
            for i, index in enumerate(slices):
                row = {key: values[i] for key, values in shares.items()}
                self.rows.append({**volume, "slice": index, "method": name, **row})
        counts = (scans[self.shown].invented(cutoff) & within).sum(dim=(1, 2))  # (N,)
        i = int(counts.argmax())
        if int(counts[i]) > self.example.count:
            images = {name: x[i, 0].cpu() for name, x in {TRUTH: hr, **estimates}.items()}
            squares = {name: self._squares(scan, within, i, hr.shape[2:]) for name, scan in scans.items()}
            note = f"slice {slices[i]} of {', '.join(volume.values())}"
            self.example = Example(int(counts[i]), note, images, squares)

    def _squares(
        self, scan: CorrelationScan, within: Tensor, i: int, shape: Sequence[int]
    ) -> dict[str, list[tuple[int, int]]]:
        side, _, cutoff = self.limits
        rows, columns = (patch_starts(length, side) for length in shape)
        labelled, invented = (getattr(scan, kind)(cutoff)[i] & within[i] for kind in KINDS)
        return {
            COLORS[kind]: [(rows[x] + side // 4, columns[y] + side // 4) for x, y in chosen.nonzero().tolist()]
            for kind, chosen in (("missing", labelled & ~invented), ("invented", invented))
        }

    def report(self, input_nyquist: float) -> str:
        """Return the tables in Markdown: shares of patches by method, and differences to the method that is shown.

        Args:
            input_nyquist: Nyquist frequency of the input, as a share of that of the truth.
        """
        rows, limits, ours = self.rows, self.limits, self.shown
        methods = list(dict.fromkeys(row["method"] for row in rows))
        chosen = [limits.column(kind) for kind in KINDS]
        others = [name for name in methods if name != ours]

        def shares(columns: Sequence[str]) -> str:
            found = [(name, key, paired(pairs(rows, name, name, key), level)) for name in methods for key in columns]
            cells = [result_cells(*one, 1, sign="") for one in found]
            return markdown_table(("method", "patches", "mean over patients", *INTERVALS), cells)

        compared = [(name, key, paired(pairs(rows, ours, name, key))) for name in others for key in chosen]
        differences = [result_cells(*one, 1) for one in compared]
        limit = [limits.column("invented", cutoff) for cutoff in CUTOFFS]
        definitions = _DEFINITIONS.format(**limits._asdict(), input=input_nyquist, floor=FLOOR, ceiling=CEILING)
        return "\n".join([
            "## Patches", "", definitions, "", shares(chosen), "",
            f"{ours}, minus each other method, in percentage points:", "",
            markdown_table(("minus", "patches", "difference", *INTERVALS), differences), "", EXPLANATION, "",
            "With other limits of the frequency:", "", shares(limit), "",
            f"The picture shows {self.example.note}, the slice with most invented patches by {ours}. The middle of "
            "each labelled patch is marked, orange where detail is invented, blue where it is missing.", "",
        ])  # fmt: skip

    def draw(self, path: Path, overwrite: bool) -> None:
        """Draw the example.

        Args:
            path: the picture.
            overwrite: replace an existing file.
        """
        images = {name: image.numpy() for name, image in self.example.images.items()}
        marked_panels(images, self.example.squares, self.limits.side // 2, path, columns=4, overwrite=overwrite)


def _percent(chosen: Tensor, within: Tensor) -> list[float]:
    """Return the share of the patches of each slice, (N, rows, columns), in percent; NaN where there is none."""
    return (100 * (chosen & within).sum(dim=(1, 2)) / within.sum(dim=(1, 2))).tolist()
