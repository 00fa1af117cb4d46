"""Lists of the volumes in a dataset, and their split by patient."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from monai.utils import ensure_tuple

from miar_monai.data.cases import cases_for_guide, find_cases
from miar_monai.data.dicom_headers import header_text, slice_files
from miar_monai.data.io import is_volume_file, read_labels, volume_stem
from miar_monai.data.outputs import ResultPaths, result_path, without_number
from miar_monai.data.slices import SliceDataset
from miar_monai.errors import DatasetError, SettingError

__all__ = [
    "SliceDataset",
    "brats_datalist",
    "lidc_datalist",
    "paired_datalist",
    "series_datalist",
    "split_by_patient",
    "subject_datalist",
    "volume_datalist",
]

logger = logging.getLogger(__name__)

Item = dict[str, str]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_SECTIONS = ("training", "validation", "test")
_BRATS_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"}
_SERIES_LAYOUT = "NIfTI files, or folders with one DICOM series each, at any depth"


def _folders(dataset_dir: Paths, layout: str) -> list[Path]:
    folders = [Path(folder) for folder in ensure_tuple(dataset_dir)]
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"{folder} is not a folder: a dataset folder with {layout} is needed; set dataset_dir.")
    return folders


def subject_datalist(dataset_dir: Paths, contrasts: Mapping[str, Sequence[str]]) -> list[Item]:
    """List the volumes of a dataset with one folder per subject and one NIfTI file per contrast.

    Args:
        dataset_dir: the folder of the subjects, or several such folders.
        contrasts: the file names of each contrast without suffix, of which the first that exists is taken;
            ``{subject}`` stands for the name of the folder.

    Returns:
        Dictionaries with ``"image"`` (path), ``"subject"`` and ``"contrast"``, sorted by path.

    Raises:
        DatasetError: if a folder is missing or has no volume of these contrasts.
    """
    names = [name.format(subject="<subject>") for name in next(iter(contrasts.values()))]
    layout = " or ".join(f"<dataset_dir>/<subject>/{name}.nii.gz" for name in names)
    items = []
    for folder in _folders(dataset_dir, layout):
        subjects = sorted(path for path in folder.iterdir() if path.is_dir())
        found = [item for subject in subjects for item in _subject_folder(subject, contrasts)]
        if not found:
            raise DatasetError(
                f"{folder} has {len(subjects)} folders but no volume of the contrasts {', '.join(contrasts)}: "
                f"{layout} is needed; set dataset_dir to the folder of the subjects."
            )
        missing = len(subjects) * len(contrasts) - len(found)
        if missing:
            logger.warning("%s: %d volumes of the contrasts %s are missing", folder, missing, ", ".join(contrasts))
        items += found
    return items


def _subject_folder(folder: Path, contrasts: Mapping[str, Sequence[str]]) -> Iterator[Item]:
    for contrast, names in contrasts.items():
        stems = (name.format(subject=folder.name) for name in names)
        for path in (folder / (stem + suffix) for stem in stems for suffix in (".nii.gz", ".nii")):
            if path.is_file():
                yield {"image": str(path), "subject": folder.name, "contrast": contrast}
                break


def brats_datalist(dataset_dir: Paths, contrasts: Sequence[str] = ("t2",)) -> list[Item]:
    """List the volumes of a BraTS folder, see `subject_datalist`.

    Both ``<subject>/<subject>_t2.nii.gz`` and the names of BraTS 2023 (``<subject>/<subject>-t2w.nii.gz``) are found.

    Args:
        dataset_dir: the folder of the subjects, or several such folders.
        contrasts: among ``"t1"``, ``"t1ce"``, ``"t2"``, ``"flair"``.

    Returns:
        Dictionaries with ``"image"`` (path), ``"subject"`` and ``"contrast"``, sorted by path.

    Raises:
        DatasetError: if a folder is missing or has no volume of these contrasts.
    """
    names = {
        contrast: (f"{{subject}}_{contrast}", f"{{subject}}-{_BRATS_2023.get(contrast, contrast)}")
        for contrast in ensure_tuple(contrasts)
    }
    return subject_datalist(dataset_dir, names)


def paired_datalist(items: Sequence[Item]) -> list[Item]:
    """Pair each volume with the other contrasts of its subject, as guides.

    Args:
        items: dictionaries with ``"image"``, ``"subject"`` and ``"contrast"``, such as those of `brats_datalist`.

    Returns:
        For each item and each other contrast of its subject a copy with ``"guide"`` (path); an item without another
        contrast as it is.

    Example:
        >>> t1, t2, lone = ({"image": f"{s}_{c}.nii", "subject": s, "contrast": c} for s, c in ("a1", "a2", "b1"))
        >>> [(item["image"], item.get("guide")) for item in paired_datalist([t1, t2, lone])]
        [('a_1.nii', 'a_2.nii'), ('a_2.nii', 'a_1.nii'), ('b_1.nii', None)]
    """
    pairs = []
    for item in items:
        guides = [
            other["image"]
            for other in items
            if other["subject"] == item["subject"] and other.get("contrast") != item.get("contrast")
        ]
        pairs += [{**item, "guide": guide} for guide in guides] or [item]
    return pairs


def series_datalist(dataset_dir: Paths, modality: str) -> list[Item]:
    """List the volumes of a dataset of NIfTI files, and folders with one DICOM series each, at any depth.

    DICOM series of other modalities, such as radiographs and segmentations, are left out.

    Args:
        dataset_dir: the folder, or several folders.
        modality: Modality of the DICOM series, such as ``"CT"`` or ``"MR"``.

    Returns:
        Dictionaries with ``"image"`` (path of the file or of the series folder) and ``"subject"``: the PatientID of a
        DICOM series, else the name of the top folder, else the stem of a NIfTI file directly in ``dataset_dir``.

    Raises:
        DatasetError: if a folder is missing or has no volume.
    """
    items = []
    for root in _folders(dataset_dir, _SERIES_LAYOUT):
        found = [item for path, _, _ in sorted(os.walk(root)) for item in _series_folder(root, Path(path), modality)]
        if not found:
            raise DatasetError(f"{root} has no {modality} volume: {_SERIES_LAYOUT}, are needed; set dataset_dir.")
        items += found
    return items


def _series_folder(root: Path, folder: Path, modality: str) -> Iterator[Item]:
    inside = folder.relative_to(root).parts
    for path in sorted(folder.iterdir()):
        if is_volume_file(path):
            yield {"image": str(path), "subject": inside[0] if inside else volume_stem(path)}
    file = next(slice_files(sorted(folder.iterdir())), None)
    if file is not None and header_text(file, "Modality") == modality:
        top = (*inside, folder.name)[0]
        yield {"image": str(folder), "subject": header_text(file, "PatientID") or top}


def lidc_datalist(dataset_dir: Paths) -> list[Item]:
    """List the CT volumes of a LIDC-IDRI folder, see `series_datalist`."""
    return series_datalist(dataset_dir, "CT")


def volume_datalist(
    inputs: Paths,
    output_dir: str | os.PathLike[str] | None = None,
    guide: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
) -> list[Item]:
    """List the volumes to super-resolve, as ``miar sr`` does.

    Args:
        inputs: a NIfTI file, a folder with a DICOM series, a zip file of either, a folder of such cases, or a sequence
            of these.
        output_dir: folder of the results, which are left out if they are among the inputs.
        guide: another contrast of the same patient: a NIfTI file, a folder with a DICOM series, or a zip file. It is
            left out if it is among the inputs.
        labels: a label map of the image in a file, checked here.

    Returns:
        Dictionaries with ``"image"`` (path), ``"name"`` (of the result, without its ending) and, where they are given,
        ``"guide"`` and ``"labels"`` (paths).

    Raises:
        ImageError: if a path does not exist, or the label map cannot be used.
        SettingError: if there is a guide or a label map, and more than one case.
        DatasetError: if a folder has no case, or a file that looks like a case but is not one.
    """
    cases = [case for path in ensure_tuple(inputs) for case in find_cases(path)]
    if guide is not None:
        cases = cases_for_guide(cases, guide)
    if problems := [case.problem for case in cases if case.problem]:
        more = f"; and {len(problems) - 1} more such problems: miar sr names all and does the other cases."
        raise DatasetError(problems[0] if len(problems) == 1 else problems[0].rstrip(".") + more)
    if labels is not None:
        read_labels(labels)
        if len(cases) > 1:
            raise SettingError(
                f"the input has {len(cases)} cases, but {labels} belongs to one: give one case at a time."
            )
    others = {name: str(path) for name, path in (("guide", guide), ("labels", labels)) if path is not None}
    items = [{"image": str(case.source), "name": case.name.as_posix(), **others} for case in cases]
    if output_dir is None:
        return items
    results = {
        os.path.realpath(path)
        for item in items
        for path in ResultPaths.of(result_path(item["image"], output_dir, name=item["name"])).volumes
    }
    return [item for item in items if without_number(os.path.realpath(item["image"])) not in results]


def split_by_patient(
    items: Sequence[Item],
    section: str,
    ratios: Sequence[float] = (7, 1, 2),
    seed: int = 0,
    split_file: str | os.PathLike[str] | None = None,
) -> list[Item]:
    """Return the items of one section; all volumes of a patient are in the same section.

    Args:
        items: dictionaries with ``"subject"``.
        section: ``"training"``, ``"validation"`` or ``"test"``.
        ratios: sizes of the three sections relative to each other, the paper's 7:1:2 by default.
        seed: seed of the shuffle; the split depends on it and on the names of the subjects only.
        split_file: a JSON file that names the subjects of each section, instead of ratios and seed. Of a name with
            folders (``"dicom/LIDC-IDRI-0006"``) the last part counts.

    Returns:
        The items of the section, in their order.

    Raises:
        DatasetError: if a section gets no patient, or the split file cannot be used.

    Example:
        >>> items = [{"image": f"{i}.nii.gz", "subject": f"p{i // 2}"} for i in range(20)]
        >>> [len(split_by_patient(items, section)) for section in ("training", "validation", "test")]
        [14, 2, 4]
    """
    present = sorted({item["subject"] for item in items})
    sections = _shuffled(present, ratios, seed) if split_file is None else _read_split(split_file)
    if section not in sections:
        raise DatasetError(f"there is no section {section!r} in the split: give one of {', '.join(sections)}.")
    absent = set(sections[section]) - set(present)
    if absent:
        logger.warning("%s: subjects of section %s without volume: %s", split_file, section, ", ".join(sorted(absent)))
    chosen = [item for item in items if item["subject"] in set(sections[section])]
    if not chosen:
        raise DatasetError(
            f"the section {section!r} is empty with {len(present)} patients in the dataset: at least one patient for "
            "each of training, validation and test is needed; add patients or give a split_file that names them."
        )
    return chosen


def _shuffled(subjects: Sequence[str], ratios: Sequence[float], seed: int) -> dict[str, Sequence[str]]:
    shuffled = [subjects[i] for i in np.random.RandomState(seed).permutation(len(subjects))]
    n_validation, n_test = (max(1, round(len(subjects) * ratio / sum(ratios))) for ratio in ratios[1:])
    n_training = max(len(subjects) - n_validation - n_test, 0)
    parts = np.split(shuffled, [n_training, n_training + n_validation])
    return dict(zip(_SECTIONS, map(np.ndarray.tolist, parts), strict=True))


def _read_split(path: str | os.PathLike[str]) -> dict[str, Sequence[str]]:
    try:
        content = json.loads(Path(path).read_text())
        split: dict[str, Sequence[str]] = {
            section: [Path(name).name for name in content[section]] for section in _SECTIONS
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"the split file {path} cannot be used ({type(error).__name__}: {error}): a JSON file with lists of "
            "subjects for 'training', 'validation' and 'test' is needed; correct it or leave split_file out."
        ) from error
    for a, b in combinations(_SECTIONS, 2):
        if both := sorted(set(split[a]) & set(split[b])):
            raise DatasetError(
                f"the split file {path} lists {', '.join(both)} for {a} and for {b}: results on patients that were "
                "trained on mean nothing; list each patient once."
            )
    return split
