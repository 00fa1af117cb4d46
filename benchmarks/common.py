"""Common code of the benchmarks: configs, batches, provenance, and writing of results."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor

from miar_monai.cli.workflow import SlicePairs, patients_note, read_config, with_contrasts
from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.outputs import check_output_folder, refuse_to_overwrite
from miar_monai.errors import check_range
from miar_monai.evaluation.tables import markdown_table
from miar_monai.inference.bundle import check_switches
from miar_monai.networks import SuperResolutionNetwork
from miar_monai.networks.weights import load_weights

Method = Callable[[Tensor], Tensor]
"""From LR slices (N, 1, h, w) to SR slices (N, 1, H, W), on one device."""

Row = dict[str, Any]
"""A row of a table: values by column."""


def consistent_title(method: str) -> str:
    """Return the title of the row of a method with data consistency.

    Example:
        >>> consistent_title("RCAN")
        'RCAN, data-consistent'
    """
    return f"{method}, data-consistent"


def open_run(
    bundle: str,
    dataset_dir: str | Sequence[str],
    output_dir: str,
    contrasts: str | Sequence[str] | None,
    settings: Mapping[str, Any],
    results: Iterable[str],
    *overlays: Path,
) -> tuple[ConfigParser, dict[str, Any]]:
    """Read the ``evaluate.json`` of a bundle with the settings of a benchmark, and check them before the work.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder of the data, or several folders.
        output_dir: folder of the results.
        contrasts: contrasts of a BraTS folder; those of the bundle by default.
        settings: values of other keys.
        results: names of the files that will be written.
        overlays: configs that are merged into it first.

    Returns:
        The config, and all values that replace those of the bundle.

    Raises:
        ConfigurationError: if the config or a key does not exist, or a switch is not True or False.
        OutputError: if the folder is not writable, or holds results that must not be replaced.
    """
    given = with_contrasts(
        {"dataset_dir": dataset_dir, "output_dir": output_dir, "progress": False, **settings}, contrasts
    )
    config = read_config(bundle, given, *overlays)
    overwrite = config.get_parsed_content("overwrite")
    check_switches(overwrite=overwrite, amp=config.get_parsed_content("amp"))
    result_files(output_dir, results, overwrite)
    return config, given


def result_files(output_dir: str | Path, names: Iterable[str], overwrite: bool) -> list[Path]:
    """Return the paths of results after checking that they can be written.

    Raises:
        OutputError: if the folder is not writable, or holds results that must not be replaced.
    """
    check_output_folder(output_dir)
    files = [Path(output_dir, name) for name in names]
    for file in () if overwrite else files:
        refuse_to_overwrite(file)
    return files


def batches(volume: SlicePairs, size: int, device: torch.device) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield the indices, the LR and the HR slices of a volume on a device, at most ``size`` at a time."""
    for start in range(0, len(volume.hr), size):
        lr, hr = (images[start : start + size].to(device) for images in (volume.lr, volume.hr))
        yield range(start, start + len(hr)), lr, hr


def load_network(config: ConfigParser) -> SuperResolutionNetwork:
    """Return the network of an ``evaluate.json`` with the weights of its checkpoint, in evaluation mode.

    Raises:
        CheckpointError: if the weights are missing, damaged, or those of another network.
    """
    get = config.get_parsed_content
    hint = "train the bundle (see its docs/README.md), or give --checkpoint."
    network: SuperResolutionNetwork = load_weights(get("network"), get("checkpoint"), hint).eval()
    return network


def listed(values: object) -> list[str]:
    """Return the values of an option that a command line gives as one of them, several, or a text with commas.

    Example:
        >>> listed("2x2,4x4"), listed((0, 0.01)), listed(0.01)
        (['2x2', '4x4'], ['0', '0.01'], ['0.01'])
    """
    return ",".join(map(str, ensure_tuple(values))).split(",")


def every_nth(volumes: Sequence[SlicePairs], every: int) -> list[SlicePairs]:
    """Return the volumes with every n-th slice of each, from the middle of the first n.

    Raises:
        SettingError: if ``every`` is less than 1, or more than the slices of a volume.
    """
    check_range("every", every, 1, min((len(volume.hr) for volume in volumes), default=float("inf")))
    part = slice(every // 2, None, every)
    return [volume._replace(lr=volume.lr[part], hr=volume.hr[part]) for volume in volumes]


def provenance(bundle: str, config: ConfigParser, volumes: Sequence[SlicePairs], batch_size: int) -> list[str]:
    """Return what is needed to reproduce the numbers: commit, patients and machine, as list items."""
    device = torch.device(config.get_parsed_content("device"))
    precision = "bfloat16" if config.get_parsed_content("amp") else "float32"
    return [
        f"- Bundle {Path(bundle).name}, commit {commit()}.",
        f"- {patients_note(config, volumes)}",
        f"- Time: median over batches of up to {batch_size} slices after a warm-up; {machine(device)}, {precision}, "
        f"torch {torch.__version__}. Data consistency is added to the time of the method it follows.",
    ]


def machine(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture and the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit of the repository, with the suffix -dirty if files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows_table(rows: Sequence[Row]) -> str:
    """Return rows with the same columns as a Markdown table, with four significant digits."""
    cells = ([f"{value:.4g}" if isinstance(value, float) else value for value in row.values()] for row in rows)
    return markdown_table(list(rows[0]), cells)


def write_csv(rows: Sequence[Row], path: Path, overwrite: bool) -> None:
    """Write rows as CSV; the columns of rows may differ."""
    with atomic_file(path, overwrite) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def publish(text: str, path: Path, overwrite: bool) -> None:
    """Write the text of a benchmark to a file and to stdout."""
    with atomic_file(path, overwrite) as part:
        part.write_text(text, encoding="utf-8")
    print(text)
