"""A page of results: tables that can be sorted, and pictures of each patient, in one HTML file without a network."""

from __future__ import annotations

import base64
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from torch import Tensor

from miar_monai.evaluation.metrics import METRICS
from miar_monai.evaluation.tables import Row, by_contrast, column_title, columns_of, finite_values, summary
from miar_monai.visualize.drawing import displayed
from miar_monai.visualize.standalone import page_head, write_html

__all__ = ["MAX_METHODS", "SlicePictures", "write_results_page"]

MAX_METHODS = 8
"""Largest number of methods with a picture of each slice, so that pages stay small."""

_GRAYS = 64  # few enough for a small file, too many to be visible
_MAX_WIDTH = 256  # of a picture on the screen

Key = tuple[str, str]
"""A patient and a contrast; the contrast is empty if it is not known."""


class _Slice(NamedTuple):
    """The pictures of a slice.

    Attributes:
        position: index in its volume.
        shape: rows and columns of the truth.
        pictures: PNG files by title.
    """

    position: int
    shape: tuple[int, int]
    pictures: dict[str, bytes]


class SlicePictures:
    """Small pictures of one slice of each patient and contrast: low resolution, methods and truth in the same window.

    The window is from the minimum to the 99.8th percentile of the truth, in 64 gray levels. Only the compressed
    pictures are kept.

    Example:
        >>> import torch
        >>> pictures, hr = SlicePictures(), torch.rand(1, 1, 16, 12)
        >>> pictures.add("case", "t2", 40, hr[..., ::4, ::4], {"darker": 0.9 * hr}, hr)
        >>> list(pictures.slices["case", "t2"].pictures)
        ['low resolution', 'darker', 'truth']
    """

    def __init__(self) -> None:
        self.slices: dict[Key, _Slice] = {}

    def add(
        self,
        subject: str,
        contrast: str | None,
        index: int,
        lr: Tensor,
        estimates: Mapping[str, Tensor],
        hr: Tensor,
    ) -> None:
        """Add a slice; further slices of the same patient and contrast are left out.

        Args:
            subject: identifies the patient.
            contrast: contrast of the volume, if the data set has several.
            index: of the slice in its volume.
            lr: the LR slice of a RAS+ volume, (1, 1, h, w).
            estimates: results by method, (1, 1, H, W); the first `MAX_METHODS` are drawn.
            hr: the true slice, (1, 1, H, W).
        """
        key = (subject, contrast or "")
        if key in self.slices:
            return
        methods = dict(list(estimates.items())[:MAX_METHODS])
        panels = {
            title: displayed(image.as_subclass(Tensor).detach().float().cpu().numpy()[0, 0])
            for title, image in {"low resolution": lr, **methods, "truth": hr}.items()
        }
        truth = panels["truth"]
        low, high = float(truth.min()), float(np.percentile(truth, 99.8))
        high = high if low < high else low + 1
        pictures = {title: _png(_levels(panel, low, high)) for title, panel in panels.items()}
        self.slices[key] = _Slice(index, (truth.shape[0], truth.shape[1]), pictures)


def write_results_page(
    path: str | os.PathLike[str],
    title: str,
    rows: Sequence[Row],
    metrics: Sequence[str],
    pictures: SlicePictures,
    notes: Iterable[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a page with the means of all methods, those of each patient, and the pictures of each patient.

    The tables of all patients are those of `SuperResolutionEvaluation.table`, one for each contrast. Patients are
    sorted by name. The worst and the best slice of each method are those of the first metric. The page contains all
    that it needs, and its Content-Security-Policy forbids requests to other places.

    Args:
        path: the page; its folder is created if needed.
        title: heading of the page.
        rows: of a `SuperResolutionEvaluation`.
        metrics: names of the metrics.
        pictures: of some or all patients.
        notes: sentences below the heading.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    return write_html(path, _page(title, rows, metrics, pictures, notes), overwrite)


def _page(
    title: str, rows: Sequence[Row], metrics: Sequence[str], pictures: SlicePictures, notes: Iterable[str]
) -> str:
    """Return the text of the page."""
    part = {
        file.name: file.read_text(encoding="utf-8") for file in (files("miar_monai.evaluation") / "template").iterdir()
    }
    columns = columns_of(rows, metrics)
    titles = list(map(column_title, columns))
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault((row["subject"], row.get("contrast", "")), []).append(row)
    patients = {f"patient-{i}": (key, found[key]) for i, key in enumerate(sorted(found), 1)}

    links, lines, sections = ['<a href="#all">All patients</a>'], [], []
    for anchor, (key, own) in patients.items():
        name = escape(", ".join(filter(None, key)))
        links.append(f'<a href="#{anchor}">{name}</a>')
        detail = []
        for method, measured in _by_method(own).items():
            cells = _summaries(measured, columns)
            known = f'<td><a href="#{anchor}">{escape(key[0])}</a></td><td>{escape(key[1])}</td>'
            lines.append(f'<tr data-method="{escape(method)}">{known}{_method(method)}{cells}</tr>')
            detail.append(f"<tr>{_method(method)}{cells}{_extremes(measured, metrics)}</tr>")
        heads = ["method", *titles, *(f"{kind} slice ({metrics[0]})" for kind in ("worst", "best") if metrics)]
        table = _table(f"Slices of {name}", heads, detail)
        shown = _pictures(pictures.slices[key], name) if key in pictures.slices else ""
        sections.append(f'<section id="{anchor}">\n<h2>{name}</h2>\n{table}\n{shown}</section>')
    means = [
        _table(
            escape(contrast) or "All slices",
            ["method", *titles],
            [f"<tr>{_method(name)}{_summaries(own, columns)}</tr>" for name, own in _by_method(section).items()],
        )
        for contrast, section in by_contrast(rows).items()
    ]
    options = [f'<option value="{escape(name)}">{escape(name)}</option>' for name in _by_method(rows)]
    script = part["page.js"]
    return Template(part["page.html"]).substitute(
        head=page_head(title, part["page.css"], script),
        links="\n".join(links),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in notes),
        means="\n".join(means),
        methods="\n".join(['<option value="">all</option>', *options]),
        patients=_table("Means over the slices", ["patient", "contrast", "method", *titles], lines, "patients"),
        sections="\n".join(sections),
        script=script,
    )


def _by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _table(caption: str, heads: Iterable[str], rows: Iterable[str], name: str = "") -> str:
    """Return a table; its titles are escaped here, its caption and rows are not."""
    titles = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    start = f'<table id="{name}">' if name else "<table>"
    body = "\n".join(rows)
    return (
        f'<div class="scroll">{start}\n<caption>{caption}</caption>\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _method(name: str) -> str:
    return f'<th scope="row">{escape(name)}</th>'


def _summaries(rows: Sequence[Row], columns: Iterable[str]) -> str:
    """Return the cells of a method, with the numbers by which they are sorted."""
    cells = []
    for column in columns:
        value, text = summary(finite_values(rows, column), column)
        cells.append(_cell(value, text))
    return "".join(cells)


def _extremes(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return the cells of the worst and the best slice in the first metric, sorted by its value."""
    if not metrics:
        return ""
    metric = METRICS[metrics[0]]
    valid = [row for row in rows if not np.isnan(row[metric.name])]
    if not valid:
        return 2 * _cell(float("nan"), "–")
    ordered = sorted(valid, key=lambda row: row[metric.name], reverse=not metric.higher_is_better)
    ends = ((row[metric.name], row["slice"]) for row in (ordered[0], ordered[-1]))
    return "".join(_cell(value, f"{index}: {_number(value, metric.decimals)}") for value, index in ends)


def _number(value: float, decimals: int) -> str:
    return "∞" if np.isinf(value) else f"{value:.{decimals}f}"


def _cell(value: float, text: str) -> str:
    number = "Infinity" if value == float("inf") else f"{float(value)!r}"  # as JavaScript reads it
    return f'<td data-value="{number}">{text}</td>'


def _pictures(shown: _Slice, name: str) -> str:
    """Return the pictures of a slice, at the same size on the screen."""
    scale = min(1.0, _MAX_WIDTH / shown.shape[1])
    height, width = (round(scale * size) for size in shown.shape)
    figures = "\n".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" width="{width}" height="{height}" '
        f'alt="{escape(title)}, slice {shown.position} of {name}"><figcaption>{escape(title)}</figcaption></figure>'
        for title, png in shown.pictures.items()
    )
    return (
        f"<p>Slice {shown.position}. The patient's right is on the left; all pictures have the window of the truth."
        f'</p>\n<div class="pictures">\n{figures}\n</div>\n'
    )


def _levels(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return gray values, 0 to 255, in `_GRAYS` steps; black where an intensity is not a number."""
    share = np.nan_to_num((image - low) / (high - low)).clip(0, 1)
    return np.rint(np.rint(share * (_GRAYS - 1)) * (255 / (_GRAYS - 1))).astype(np.uint8)


def _png(gray: np.ndarray) -> bytes:
    """Return a PNG file of gray values, (rows, columns); Pillow is not among the requirements of the package."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", gray.shape[1], gray.shape[0], 8, 0, 0, 0, 0)  # 8-bit gray, not interlaced
    lines = np.pad(gray, ((0, 0), (1, 0))).tobytes()  # each line starts with its filter, 0: none
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
