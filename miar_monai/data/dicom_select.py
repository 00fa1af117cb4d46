"""Selection of one of several volumes in a DICOM series, such as echoes or time points, by its headers."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from miar_monai.data.dicom_frames import FRAME_NUMBER
from miar_monai.data.dicom_headers import numbers, values
from miar_monai.errors import GeometryError, SettingError

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["DISTINGUISHING_ELEMENTS", "check_one_volume", "coverage_remarks", "parse_conditions", "select_slices"]

DISTINGUISHING_ELEMENTS = {
    "EchoTime": ("echoes", "ms"),
    "DiffusionBValue": ("diffusion b-values", "s/mm2"),
    "DiffusionGradientOrientation": ("diffusion directions", ""),
    "TemporalPositionIdentifier": ("temporal positions", ""),
    "InversionTime": ("inversion times", "ms"),
    "FlipAngle": ("flip angles", "degrees"),
    "RepetitionTime": ("repetition times", "ms"),
    "ComplexImageComponent": ("components of a complex image", ""),
    "ImageType": ("image types", ""),
    "KVP": ("tube voltages", "kV"),
    "ConvolutionKernel": ("reconstruction kernels", ""),
    "NominalPercentageOfCardiacPhase": ("cardiac phases", "%"),
    "TriggerTime": ("trigger times", "ms"),
    "AcquisitionNumber": ("acquisitions", ""),
    "EchoNumbers": ("echo numbers", ""),
    "SliceThickness": ("slice thicknesses", "mm"),
    "SeriesNumber": ("series numbers", ""),
    "AcquisitionDateTime": ("acquisition times", ""),
    "AcquisitionTime": ("acquisition times", ""),
    "ContentTime": ("content times", ""),
}
"""Elements that may distinguish the volumes of a series, most specific first, with their descriptions and units."""

_POSITION_TOLERANCE = 1e-2  # mm
_COSINE_TOLERANCE = 2e-3


class Condition(NamedTuple):
    """A condition on the headers of slices: ``keyword=value``, or the n-th value at each position.

    Attributes:
        keyword: of a DICOM element.
        value: one of its values, or all of them separated by backslashes; ``#2`` for the second at each position.
    """

    keyword: str
    value: str

    @property
    def rank(self) -> int:
        """Rank of the value at each position, in ascending order from 1; 0 if the value itself is given."""
        return int(self.value[1:]) if re.fullmatch("#[1-9][0-9]*", self.value) else 0


def parse_conditions(select: Sequence[str]) -> list[Condition]:
    """Parse conditions on slices.

    Args:
        select: conditions such as ``"EchoTime=80"`` or ``"TriggerTime=#2"``.

    Raises:
        SettingError: if one is malformed, or its keyword is not that of a DICOM element.

    Example:
        >>> parse_conditions(["EchoTime=80"])
        [Condition(keyword='EchoTime', value='80')]
    """
    from pydicom.datadict import tag_for_keyword

    found = []
    for text in [select] if isinstance(select, str) else select:
        keyword, _, value = (part.strip() for part in text.partition("="))
        if not (keyword and value) or tag_for_keyword(keyword) is None:
            raise SettingError(
                f"{text!r} is not a condition on slices: the keyword of a DICOM element and one of its values are "
                "needed, such as EchoTime=80; give both."
            )
        found.append(Condition(keyword, value))
    return found


def select_slices(folder: Path, headers: Sequence[Dataset], select: Sequence[str]) -> list[Dataset]:
    """Return the headers of the slices that meet all conditions.

    Args:
        folder: of the series.
        headers: of its slices.
        select: see `parse_conditions`.

    Raises:
        SettingError: if a condition is malformed, or met by no slice.
        GeometryError: if the n-th value is selected, and the number of values differs between positions.
    """
    chosen = list(headers)
    for condition in parse_conditions(select):
        found = [header for header in chosen if _matches(_values(header, condition.keyword), condition.value)]
        if condition.rank:
            found = _of_rank(folder, chosen, condition)
        if not found:
            present = sorted({_values(header, condition.keyword) for header in chosen} - {""}, key=_order)
            has = f"{condition.keyword} is {_listed(present)}" if present else f"none has {condition.keyword}"
            raise SettingError(
                f"{folder}: no slice has {condition.keyword}={condition.value}: in its {len(chosen)} slices {has}; "
                "choose one of these values."
            )
        chosen = found
    return chosen


def _of_rank(folder: Path, headers: Sequence[Dataset], condition: Condition) -> list[Dataset]:
    """Return the headers with the n-th value, in ascending order, at their position.

    Every position must have the same number of values: otherwise the n-th ones belong to different volumes.
    """
    found, counts = [], set()
    for place in _places(headers):
        texts = [_values(headers[i], condition.keyword) for i in place]
        order = sorted(set(texts), key=_order)
        counts.add(len(order))
        if condition.rank <= len(order):
            found += [headers[i] for i, text in zip(place, texts, strict=True) if text == order[condition.rank - 1]]
    if found and len(counts) > 1:
        raise GeometryError(
            f"{folder}: {min(counts)} to {max(counts)} values of {condition.keyword} are at each position, so"
            f" {condition.keyword}={condition.value} would mix volumes; the same number at all positions is needed:"
            " select by another element, or remove the incomplete volume."
        )
    return found


def coverage_remarks(headers: Sequence[Dataset], chosen: Sequence[Dataset]) -> tuple[str, ...]:
    """Return a remark if a volume covers fewer positions than its series.

    Args:
        headers: of all slices of the series.
        chosen: of the slices of the volume.
    """
    places, count = _places(headers), len(_places(chosen))
    if count == len(places) or len(places) == len(headers):  # complete, or one of several stacks
        return ()
    return (f"the selected volume has slices at {count} of the {len(places)} positions of its series.",)


def _values(header: Dataset, keyword: str) -> str:
    """Return the values of an element as one string, with numbers in a common format."""
    reals = numbers(header, keyword)
    return "\\".join([f"{number:g}" for number in reals] or values(header, keyword))


def _matches(text: str, value: str) -> bool:
    """Return whether values equal, or include, a value; compared as numbers if possible, else ignoring case."""

    def same(a: str, b: str, tolerance: float = 0) -> bool:
        try:
            return math.isclose(float(a), float(b), rel_tol=1e-5, abs_tol=tolerance)
        except ValueError:
            return a.strip().lower() == b.strip().lower()

    parts, given = text.split("\\"), value.split("\\")
    if 1 < len(given) == len(parts):  # numbers such as direction cosines, which may be rounded
        return all(same(part, other, _COSINE_TOLERANCE) for part, other in zip(parts, given, strict=True))
    return same(text, value) or (text != "" and any(same(part, value) for part in parts))


def _order(text: str) -> tuple[bool, float, str]:
    """Return a sort key: numbers by size, then other strings."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _places(headers: Sequence[Dataset]) -> list[np.ndarray]:
    """Return the indices of the slices at each position."""
    where = np.array([[*numbers(header, "ImagePositionPatient"), *3 * [np.nan]][:3] for header in headers])
    order = np.argsort(where[:, np.ptp(where, axis=0).argmax()], kind="stable")
    apart = ~(np.linalg.norm(np.diff(where[order], axis=0), axis=1) < _POSITION_TOLERANCE)
    return np.split(order, np.flatnonzero(apart) + 1)


def check_one_volume(folder: Path, headers: Sequence[Dataset]) -> None:
    """Check that a series has one slice at each position.

    Args:
        folder: of the series.
        headers: of its slices.

    Raises:
        GeometryError: if it has several; the message names the elements that distinguish them.
    """
    places = _places(headers)
    if len(places) == len(headers):
        return
    counts = sorted({len(place) for place in places})
    chosen = _choice(headers, places)
    if not chosen:
        raise GeometryError(
            f"{folder}: {len(headers) - len(places)} slices share a position with another one ({len(headers)} slices "
            f"at {len(places)} positions), and their headers do not distinguish volumes; one volume is "
            "needed: remove the copies, or export the series again."
        )
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    found = " and ".join(_named(headers, counts[-1], condition) for condition in chosen)
    options = " ".join(f"--select {shlex.quote('='.join(condition))}" for condition in chosen)
    raise GeometryError(
        f"{folder}: {several} slices are at each position, of {found}; one volume is needed: choose it, for example by "
        f"{options} (or select of miar_monai.data.io.read_volume)."
    )


def _choice(headers: Sequence[Dataset], places: Sequence[np.ndarray]) -> list[Condition]:
    """Return example conditions that leave one slice at each position, with the fewest and most specific elements."""
    numbers_ = ("InstanceNumber", FRAME_NUMBER)
    texts = {name: [_values(header, name) for header in headers] for name in (*DISTINGUISHING_ELEMENTS, *numbers_)}
    varying = [
        name for name in DISTINGUISHING_ELEMENTS if any(len({texts[name][i] for i in place}) > 1 for place in places)
    ]
    for names in chain.from_iterable(combinations(varying, count) for count in (1, 2, 3)):
        found = [Counter(tuple(texts[name][i] for name in names) for i in place) for place in places]
        once = [key for key, _ in found[0].items() if all(key) and all(counter[key] == 1 for counter in found)]
        if once:
            example = min(once, key=lambda key: [_order(text) for text in key])
            return [Condition(name, _shortest(text, texts[name])) for name, text in zip(names, example, strict=True)]
    for name in (*varying, *numbers_):  # whose values differ between positions
        distinct = {len({texts[name][i] for i in place} - {""}) for place in places}
        if distinct == {len(place) for place in places} and len(distinct) == 1:
            return [Condition(name, "#1")]
    return []


def _shortest(text: str, others: Sequence[str]) -> str:
    r"""Return a value that no other image has, such as ``M`` of ``ORIGINAL\PRIMARY\M``, or all values."""
    own = [part for part in text.split("\\") if part and _order(part)[0]]
    return next((part for part in own if all(other == text or not _matches(other, part) for other in others)), text)


def _named(headers: Sequence[Dataset], most: int, condition: Condition) -> str:
    """Return how volumes differ, such as ``2 echoes (EchoTime 10 and 80 ms)``."""
    name = condition.keyword
    plural, unit = DISTINGUISHING_ELEMENTS.get(name, ("instances", ""))
    if condition.rank:
        return f"{most} {plural} ({name}, whose values differ between positions)"
    present = sorted({_values(header, name) for header in headers} - {""}, key=_order)
    return f"{len(present)} {plural} ({name} {' '.join(filter(None, (_listed(present), unit)))})"


def _listed(texts: Sequence[str]) -> str:
    """Return an enumeration, shortened to the first and the last items."""
    shown = [*texts[:4], "...", texts[-1]] if len(texts) > 6 else list(texts)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
