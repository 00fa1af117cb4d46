"""Whether intensities are Hounsfield units."""

from __future__ import annotations

import numpy as np

__all__ = ["MAX_AIR", "ct_units"]

MAX_AIR = -500.0
"""Upper limit of lung and gas in HU."""

_MIN_BONE = 500.0  # HU
_OFFSET = 1024  # of a CT that is stored as unsigned integers


def ct_units(array: np.ndarray) -> str:
    """Guess from the intensities whether a volume is a CT.

    A CT in HU has air near -1000 and soft tissue near 0, and fewer voxels between air and padding; MR phase images have
    voxels everywhere. Unsigned CTs are 1024 higher, in the range of MR. But MR has hardly any voxels as bright as bone,
    and not nearly all of the others within 175 HU of water.

    Args:
        array: intensities, of any shape.

    Returns:
        ``"HU"``, ``"HU + 1024"``, or an empty text for other images.

    Example:
        >>> chest = np.array([-1000.0] * 3 + [-800.0] * 3 + [40.0] * 4)
        >>> ct_units(chest), ct_units(chest - chest.min())
        ('HU', '')
    """

    def share(low: float, high: float) -> float:
        return float(np.mean((array >= low) & (array <= high)))

    air = share(-1100, -850)
    if air >= 0.05 and share(-150, 200) >= 0.05 and share(-1900, -1100.5) < air:
        return "HU"
    if array.min() < 0 or array.max() < _MIN_BONE + _OFFSET:
        return ""
    body = share(MAX_AIR + _OFFSET, np.inf)
    tissue = share(_OFFSET - 174, _OFFSET + 176)
    return "HU + 1024" if share(1, 124) >= 0.03 and body >= 0.01 and tissue >= 0.7 * body else ""
