"""Checks for interpolation by the scanner, and for interleaved slices of different brightness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miar_monai.data.grid_request import MAX_FACTOR, PATIENT_AXES
from miar_monai.data.io import Volume
from miar_monai.data.spectrum import MAX_LINES, line_spectrum

__all__ = ["acquired_spacing", "scanner_warnings", "slice_alternation"]

_SEGMENT = 64  # voxels of a line: fits into a head, and resolves the step
_HALF_STEP = 2  # bins, due to the window
_BINS = np.arange(10, 27)  # of 32 up to the Nyquist frequency: interpolation by factors between about 1.2 and 3.2
# Measured in-plane: at most 0.2 dB in 11 CTs, 13 in 75 MRIs and 10 in blurred ones, at least 22 where two MRIs and a CT
# were zero-filled by 1.25 to 2 with noise of up to 2 % of the range. Coarse rounding after zero-filling hides the step.
_MIN_STEP = 18.0  # dB

_ACCURACY = 0.06  # of a spacing in the spectrum
_MIN_STATED = 1.2  # acquired over stored spacing in the headers, likewise; less is due to rounding of the matrix

# Random brightness of 14 slices is taken for alternation in less than 1 % of simulated volumes.
_MIN_SLICES = 14  # with two neighbors
_TISSUE = 0.1  # of the 99th percentile: darker voxels are air
_MIN_OVERLAP = 200  # voxels of tissue in three adjacent slices
_MIN_ALTERNATION = 0.02  # measured: at most 0.008 in the same MRIs, with slices of 1 to 5.5 mm


def scanner_warnings(lr: Volume, factors: Sequence[float] | None = None) -> list[str]:
    """Return sentences on interpolation by the scanner and on slices of alternating brightness.

    Args:
        lr: the input.
        factors: how many times finer its patient axes become, (3,); by default those of the axial plane, or of a single
            slice. What the headers state of other axes does not matter.

    Example:
        >>> from pathlib import Path
        >>> array = np.ones((20, 20, 24))
        >>> array[:, :, ::2] *= 0.9
        >>> print(*scanner_warnings(Volume(array, np.eye(4), np.dtype("float32"), Path("x"))))
        odd and even slices differ by 11 % in brightness, as in interleaved acquisitions: so will those of the result.
    """
    sentences = _interpolation_warnings(lr, factors)
    alternation = slice_alternation(lr.array, lr.grid.patient_axes.index(2))
    if alternation:
        sentences.append(
            f"odd and even slices differ by {100 * alternation:.0f} % in brightness, as in interleaved acquisitions: so"
            " will those of the result."
        )
    return sentences


def _interpolation_warnings(lr: Volume, factors: Sequence[float] | None) -> list[str]:
    """Return a sentence on the axes along which the scanner interpolated, by the spectrum and by the headers."""
    parts, spacings = [], [*lr.grid.patient_spacing]
    for axis, stored in enumerate(lr.grid.patient_spacing):
        voxel_axis, is_finer = lr.grid.patient_axes.index(axis), axis != lr.grid.normal_axis
        # Along the slices, linear interpolation of thick ones has zeros in its spectrum that resemble a step.
        measured = stored * (acquired_spacing(lr.array, voxel_axis) or 0) if is_finer else 0
        is_finer = is_finer if factors is None else factors[axis] > 1
        stated = (lr.acquired_spacing or 0) if is_finer and voxel_axis != lr.slice_axis else 0
        stated = stated if _MIN_STATED <= stated / stored <= MAX_FACTOR else 0
        if not measured and not stated:
            continue
        found = ([f"about {measured:.2g} mm"] if measured else []) + (
            [f"{stated:.3g} mm by its AcquisitionMatrix"] if stated else []
        )
        parts.append(f"{PATIENT_AXES[axis]} (voxels of {stored:.3g} mm, acquired at {', '.join(found)})")
        # the spectrum shows the fewer lines of the phase direction too, and the headers are exact
        agree = stated and (not measured or abs(measured / stated - 1) <= _ACCURACY)
        spacings[axis] = stated if agree else measured
    if not parts:
        return []
    option = ",".join(f"{mm:.3g}" for mm in spacings)
    return [
        f"the image was interpolated along {' and '.join(parts)}, and its result is less sharp than that of the"
        f" original: give the original, or the acquired spacing (--acquired-spacing {option})."
    ]


def acquired_spacing(array: np.ndarray, axis: int) -> float | None:
    """Return the spacing at which an interpolated image was acquired, in voxels, or None without interpolation.

    Interpolation by zero-filling in k-space, or by a long sinc, leaves a step in the spectrum: hardly any power above
    the Nyquist frequency of the acquisition. Blur and slice profiles leave no step; linear interpolation and
    most splines leave none either and are not recognized (a cubic spline by 4 or more can be taken for a smaller
    factor). The spectrum is the mean over segments of lines within tissue.

    Args:
        array: intensities, (X, Y, Z).
        axis: the axis along which the spectrum is taken; with fewer than 64 voxels, the result is None.

    Returns:
        A number between about 1.2 and 3.2, or None.

    Example:
        >>> image = np.random.default_rng(0).uniform(1, 2, (64, 64, 4))
        >>> finer = 2 * np.fft.irfft(np.fft.rfft(image, axis=0), 128, axis=0)  # zero-filled in k-space
        >>> round(acquired_spacing(finer, 0)), acquired_spacing(finer, 1)
        (2, None)
    """
    power = _power(array, axis)
    if power is None:
        return None
    drops = np.array([power[i - _HALF_STEP] - power[i + _HALF_STEP :].max() for i in _BINS])
    slopes = power[_BINS - 3 * _HALF_STEP] - power[_BINS - _HALF_STEP]
    # A steep but smooth decline is no step: the drop of a Gaussian is at most 1.7 times the slope before it.
    steps = drops - 2 * slopes.clip(min=0)
    if steps.max() < _MIN_STEP:
        return None
    before = _BINS[steps.argmax()] - _HALF_STEP
    edge = power[before] - 6  # dB: half the amplitude, reached between two bins
    after = before + int(np.argmax(power[before:] < edge))
    cutoff = after - (edge - power[after]) / (power[after - 1] - power[after])
    return float(_SEGMENT / 2 / cutoff)


def _power(array: np.ndarray, axis: int) -> np.ndarray | None:
    """Return the power spectrum along an axis in dB, (33,) up to the Nyquist frequency; None with too little tissue."""
    power = line_spectrum(array, axis, _SEGMENT)
    return None if power is None else np.asarray(10 * np.log10(power / power.max() + 1e-12))


def slice_alternation(array: np.ndarray, axis: int) -> float:
    """Return the difference in brightness between odd and even slices over their mean, or 0 if they do not alternate.

    Each slice is compared with the mean of its two neighbors, by the median over the voxels that are tissue in all
    three, so that anatomy has little influence. Nine of ten slices must alternate by at least half of the result.

    Args:
        array: intensities, (X, Y, Z); those of air are about 0: with values far below, as in HU, the result is 0.
        axis: the axis across the slices; with fewer than 16 slices of tissue, the result is 0.

    Returns:
        A fraction, at least 0.02, or 0.

    Example:
        >>> image = np.ones((20, 20, 24))
        >>> image[:, :, ::2] *= 0.9
        >>> round(slice_alternation(image, 2), 2), slice_alternation(np.ones((20, 20, 24)), 2)
        (0.11, 0.0)
    """
    stride = int(np.ceil(np.sqrt(array.size / array.shape[axis] / MAX_LINES)))
    slices = np.moveaxis(array, axis, 0)[:, ::stride, ::stride]
    threshold = _TISSUE * np.percentile(slices, 99)
    if slices.min() < -threshold:
        return 0.0
    differences = []
    for k in range(1, len(slices) - 1):
        tissue = (slices[k - 1 : k + 2] > threshold).all(0)
        if np.count_nonzero(tissue) >= _MIN_OVERLAP:
            middle, neighbors = slices[k][tissue], (slices[k - 1][tissue] + slices[k + 1][tissue]) / 2
            differences.append((-1) ** k * 2 * np.median(middle - neighbors) / np.median(middle + neighbors))
    if len(differences) < _MIN_SLICES:
        return 0.0
    signed = np.array(differences) * np.sign(np.median(differences))
    size = float(np.median(signed))
    return size if size >= _MIN_ALTERNATION and np.quantile(signed, 0.1) >= size / 2 else 0.0
