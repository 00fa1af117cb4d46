"""A page that shows a result beside its input: one HTML file, which a browser opens without a network."""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import prod
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from miar_monai.data.geometry import fov_corners
from miar_monai.data.hounsfield import ct_units
from miar_monai.data.volume import Volume, shown_maps
from miar_monai.errors import ImageError, SettingError
from miar_monai.visualize.standalone import page_head, write_html

__all__ = ["CT_WINDOWS", "MAX_PAGE_VOXELS", "check_page", "write_page"]

MAX_PAGE_VOXELS = 2**27
"""Voxels of the largest result that a page can hold: browsers cannot load much larger texts."""

CT_WINDOWS = {"lung": (1500, -600), "soft tissue": (400, 40), "bone": (1800, 400)}
"""Usual windows of CT: width and level in HU."""

_LEVELS, _MAP_LEVELS = 4096, 256  # of the windows, for floats; a screen shows 256
_AIR = -1024.0  # HU; darker voxels are padding

Box = tuple[slice, slice, slice]


class _Layer(NamedTuple):
    """A volume of the page.

    Attributes:
        key: identifier of its element.
        name: for the reader.
        volume: cropped.
        colormap: of NiiVue.
        window: intensities of the ends of the color map.
        levels: number of steps of the window that floats are rounded to.
    """

    key: str
    name: str
    volume: Volume
    colormap: str
    window: tuple[float, float]
    levels: int = _LEVELS


def check_page(shape: Sequence[int]) -> None:
    """Check before the work that a page can hold a result.

    Args:
        shape: of the result.

    Raises:
        SettingError: if it has more than `MAX_PAGE_VOXELS` voxels.

    Example:
        >>> check_page((1024, 1024, 512))
        Traceback (most recent call last):
            ...
        miar_monai.errors.SettingError: the result has 1024x1024x512 voxels, but a page holds at most 134217728: leave \
the page out, or ask for fewer voxels.
    """
    if prod(shape) > MAX_PAGE_VOXELS:
        raise SettingError(
            f"the result has {'x'.join(map(str, shape))} voxels, but a page holds at most {MAX_PAGE_VOXELS}: leave the "
            "page out, or ask for fewer voxels."
        )


def write_page(
    path: str | os.PathLike[str],
    lr: Volume,
    sr: Volume,
    facts: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    overwrite: bool = False,
    maps: Mapping[str, Volume] | None = None,
) -> Path:
    """Write a page that shows the input and the result in three planes, with a slider between them.

    Both have the same window: from the minimum to the 99.8th percentile of LR, for CT in HU not below -1024, with those
    of `CT_WINDOWS` to choose from. Both are drawn voxel by voxel, without interpolation. Maps of SR, such as its
    expected error, are overlays, one at a time. The page contains all that it needs, also the viewer NiiVue, and its
    Content-Security-Policy forbids requests to other places.

    The volumes are cropped to the voxels of LR that differ from its minimum, with a margin of one voxel, and stored
    as 16-bit integers: exactly if they are integers of 16 bits, otherwise rounded to 1/4096 of the window (more
    coarsely if the range exceeds 16 windows), maps to 1/256 of their color bars. Positions in millimeters
    are those of the files.

    Args:
        path: the page. Its folder is created if needed.
        lr: the input.
        sr: its result, on any grid that overlaps.
        facts: what else the page says, such as the model, by its name.
        warnings: sentences on the input and the result.
        overwrite: replace an existing file.
        maps: volumes on any grid that overlaps, in the units of the input, by what they show; those of
            `miar_monai.data.volume.shown_maps` by default.

    Returns:
        ``path``.

    Raises:
        SettingError: if the result is too large for a page.
        ImageError: if both volumes do not overlap.
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    check_page(sr.array.shape)
    box = _content(lr.array)
    cropped = _crop(lr, box)
    corners = fov_corners(cropped.affine, cropped.array.shape)
    unit = "HU" if lr.modality == "CT" or (not lr.modality and ct_units(lr.array) == "HU") else "units of the input"
    window = _window(lr.array, in_hu=unit == "HU")
    layers = [
        _Layer("result", "result", _crop(sr, _covering(sr, corners, lr)), "gray", window),
        _Layer("input", "input", cropped, "opaque gray", window),
    ]
    table = [_row("Input", lr), _row("Result", sr)]
    for number, (name, volume) in enumerate((shown_maps(sr) if maps is None else maps).items(), 1):
        layers.append(_map_layer(f"map-{number}", name, _crop(volume, _covering(volume, corners, lr))))
        table.append(_row(escape(name[:1].upper() + name[1:]), volume))
    return write_html(path, _page(layers, table, unit, lr, sr, facts or {}, warnings), overwrite)


def _window(array: np.ndarray, in_hu: bool) -> tuple[float, float]:
    """Return the black and the white intensity."""
    low, high = float(array.min()), float(np.percentile(array, 99.8))
    low = max(low, _AIR) if in_hu else low
    return (low, high) if low < high else (float(array.min()), float(array.max()))


def _map_layer(key: str, name: str, volume: Volume) -> _Layer:
    """Return a map with a window from 0, or from its minimum if that is lower, to its 99.8th percentile."""
    low = min(float(volume.array.min()), 0.0)
    high = float(np.percentile(volume.array, 99.8))
    window = (low, high) if high > low else (low, float(volume.array.max()))
    return _Layer(key, name, volume, "inferno", window if window[1] > low else (low, low + 1), _MAP_LEVELS)


def _content(array: np.ndarray) -> Box:
    """Return the box of the voxels that differ from the minimum, with a margin of one voxel."""
    inside = array != array.min()
    ranges = []
    for axis in range(3):
        found = np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis)))
        ranges.append((int(found[0]) - 1, int(found[-1]) + 2) if found.size else (0, array.shape[axis]))
    return _box(ranges, array.shape)


def _covering(volume: Volume, corners: np.ndarray, lr: Volume) -> Box:
    """Return the box of the voxels that cover the space between some corners in millimeters."""
    indices = apply_affine(np.linalg.inv(volume.affine), corners)
    low = np.floor(indices.min(axis=0) + 0.5 + 1e-3).astype(int)  # indices of centers are integers
    high = np.ceil(indices.max(axis=0) + 0.5 - 1e-3).astype(int)
    box = _box(zip(low.tolist(), high.tolist(), strict=True), volume.array.shape)
    if any(part.start >= part.stop for part in box):
        raise ImageError(
            f"{volume.path} and {lr.path} have no position in millimeters in common: a result and its input are needed;"
            " give those that belong together."
        )
    return box


def _box(ranges: Iterable[tuple[int, int]], shape: tuple[int, ...]) -> Box:
    """Return a box, cut where it leaves the volume."""
    x, y, z = (slice(max(low, 0), min(high, size)) for (low, high), size in zip(ranges, shape, strict=True))
    return x, y, z


def _crop(volume: Volume, box: Box) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] = apply_affine(affine, [part.start for part in box])
    return volume._replace(array=volume.array[box], affine=affine)


def _as_levels(array: np.ndarray, dtype: np.dtype, step: float) -> tuple[np.ndarray, float, float]:
    """Return 16-bit integers, and the slope and the intercept that turn them into intensities; floats have a step."""
    low, high = float(array.min()), float(array.max())
    if dtype.kind in "iu" and high - low < 2**16:
        slope, inter = 1.0, 0.0 if low >= -(2**15) and high < 2**15 else round(low) + 2.0**15
    else:
        slope = max(step, (high - low) / (2**16 - 1)) or 1.0  # not 0 for a constant volume
        inter = low + 2**15 * slope
    levels = np.rint((array.astype(np.float64) - inter) / slope)
    return levels.clip(-(2**15), 2**15 - 1).astype("<i2"), slope, inter


def _nifti(layer: _Layer) -> bytes:
    """Return a compressed NIfTI file; always the same bytes for the same volume."""
    volume, (low, high) = layer.volume, layer.window
    levels, slope, inter = _as_levels(volume.array, volume.dtype, (high - low) / layer.levels)
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(levels.dtype)
    header.set_data_shape(levels.shape)
    header.set_sform(volume.affine, code=1)
    header.set_zooms(voxel_sizes(volume.affine))
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = slope, inter, 352, b"n+1"
    return gzip.compress(header.binaryblock + bytes(4) + levels.tobytes(order="F"), compresslevel=9, mtime=0)


def _row(name: str, volume: Volume) -> str:
    """Return a row of the table: size, spacing, field of view, range and mean."""
    spacing = voxel_sizes(volume.affine)
    array = volume.array
    texts = [
        " × ".join(map(str, array.shape)),
        " × ".join(f"{mm:.4g}" for mm in spacing),
        " × ".join(f"{mm:.4g}" for mm in spacing * array.shape),
        f"{array.min():.5g} to {array.max():.5g}",
        f"{array.mean(dtype=np.float64):.5g}",
    ]
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{text}</td>" for text in texts) + "</tr>"


def _page(
    layers: Sequence[_Layer],
    rows: Sequence[str],
    unit: str,
    lr: Volume,
    sr: Volume,
    facts: Mapping[str, str],
    warnings: Sequence[str],
) -> str:
    """Return the page with its volumes, rows of its table and texts."""
    folder = files("miar_monai.visualize") / "viewer"
    part = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    library, script = part["niivue.umd.js"], part["page.js"]
    options = (f'<option value="{n}">{escape(layer.name)}</option>' for n, layer in enumerate(layers) if n > 1)
    presets = {"full range": layers[0].window}
    for name, (width, level) in CT_WINDOWS.items() if unit == "HU" else ():
        presets[f"{name}: width {width}, level {level}"] = level - width / 2, level + width / 2
    windows = (f'<option value="{low:.5g} {high:.5g}">{name}</option>' for name, (low, high) in presets.items())
    settings: dict[str, Any] = {
        "oriented": bool(lr.space),
        "volumes": [
            {"id": layer.key, "name": layer.name, "colormap": layer.colormap, "window": layer.window}
            for layer in layers
        ],
    }
    heads = ("Volume", "Voxels", "Spacing (mm)", "Field of view (mm)", f"Range ({unit})", f"Mean ({unit})")
    data = (
        f'<script type="application/octet-stream" id="{layer.key}">{base64.b64encode(_nifti(layer)).decode()}</script>'
        for layer in layers
    )
    listed = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in warnings)
    return Template(part["template.html"]).substitute(
        head=page_head(f"{sr.path.name}: super-resolved from {lr.path.name}", part["page.css"], library, script),
        label="Input and result in axial, coronal and sagittal planes; their sizes and intensities are in the table",
        unit=f" ({unit})",
        warnings=f'<section aria-label="Warnings"><ul class="warnings">\n{listed}</ul></section>' if warnings else "",
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()),
        table="<tr>" + "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr>\n" + "\n".join(rows),
        licenses=escape(part["LICENSES.txt"]),
        maps="\n".join(options),
        presets="\n".join(windows),
        settings=json.dumps(settings).replace("<", "\\u003c"),  # a name of a file must not end the element
        volumes="\n".join(data),
        library=library,
        script=script,
    )
