"""Names of results, and whether they may be written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from monai.utils import ensure_tuple

from miar_monai.data.atomic_write import check_name, refuse_to_overwrite
from miar_monai.data.cases import case_stem
from miar_monai.errors import OutputError

__all__ = ["check_results", "result_path"]


def result_path(
    source: str | os.PathLike[str], output_dir: str | os.PathLike[str], postfix: str = "sr", name: str = ""
) -> Path:
    """Return where the result of an input goes.

    Args:
        source: the input.
        output_dir: folder of the results.
        postfix: ending of the name.
        name: of the result, instead of that of the input; perhaps with folders.

    Example:
        >>> result_path("scans/case.nii.gz", "output").as_posix()
        'output/case_sr.nii.gz'
        >>> result_path("scans/a/case.nii.gz", "output", name="a/case").as_posix()
        'output/a/case_sr.nii.gz'
    """
    return Path(output_dir, f"{name or case_stem(Path(source))}_{postfix}.nii.gz")


def check_results(
    items: Sequence[Mapping[str, str]],
    output_dir: str | os.PathLike[str],
    postfix: str | Sequence[str] = "sr",
    overwrite: bool = False,
    key: str = "image",
) -> None:
    """Check, before hours of work, that each input has a result of its own and replaces none.

    Args:
        items: the inputs, ``key`` holding the path and perhaps ``"name"`` the name of the result.
        output_dir: folder of the results.
        postfix: ending of their names, or the endings where an input has several.
        overwrite: whether existing results may be replaced.
        key: of the path.

    Raises:
        OutputError: if two inputs would be written to the same file, a name is too long, or a result exists and
            ``overwrite`` is False.
    """
    taken: dict[Path, str] = {}
    for item, ending in product(items, ensure_tuple(postfix)):
        path = result_path(item[key], output_dir, ending, item.get("name", ""))
        if path in taken:
            raise OutputError(
                f"{taken[path]} and {item[key]} would both be written to {path}; give them one at a time, each with an "
                "output folder of its own."
            )
        taken[path] = item[key]
        check_name(path)
        if not overwrite:
            refuse_to_overwrite(path)
