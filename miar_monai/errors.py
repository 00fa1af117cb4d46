"""Errors for users: one sentence each, never a traceback.

The sentence says what was found and where, what is needed, and what to do. Each class also derives from the built-in
exception with the same meaning, so that generic code can handle it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from types import TracebackType

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DatasetError",
    "ExistsError",
    "GeometryError",
    "ImageError",
    "MiarError",
    "MissingWeightsError",
    "OutputError",
    "SettingError",
    "check_choice",
    "check_range",
    "check_whole",
    "find_miar_error",
    "in_one_sentence",
    "report_errors_in_one_sentence",
    "sentence_for_user",
]


class MiarError(Exception):
    """Base class of all errors that a user can fix."""


class ImageError(MiarError, ValueError):
    """An image cannot be used: unreadable, truncated, of the wrong dimension, not finite, constant."""


class GeometryError(MiarError, ValueError):
    """Positions in millimeters are unreliable: singular affine, missing slices, several series."""


class DatasetError(MiarError, ValueError):
    """A dataset folder or a split file is missing, empty, or not laid out as expected."""


class CheckpointError(MiarError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another network."""


class MissingWeightsError(MiarError, FileNotFoundError):
    """Weights of a metric or a perceptual loss are missing."""


class ConfigurationError(MiarError, ValueError):
    """A setting is unknown or out of range, or a config cannot be used."""


class SettingError(ConfigurationError):
    """A setting, device or model that the caller chose is unknown or out of range."""


class OutputError(MiarError, OSError):
    """A result cannot be written, or would overwrite something."""


class ExistsError(OutputError):
    """A result would overwrite a file or folder.

    Args:
        path: the existing file or folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(str(path))
        self.path = path

    def __str__(self) -> str:
        return self.sentence("overwrite=True")

    def sentence(self, option: str) -> str:
        """Return the message, with the option that allows overwriting where the caller is.

        Example:
            >>> ExistsError("a.nii").sentence("--overwrite").split(": ")[0]
            'a.nii exists already and is left as it is'
        """
        return (
            f"{self.path} exists already and is left as it is: give another output, remove it, or allow overwriting "
            f"({option})."
        )


def find_miar_error(error: BaseException | None) -> MiarError | None:
    """Return the first `MiarError` in the chain of causes of ``error``, or None.

    MONAI and ignite wrap the errors of transforms and components.

    Example:
        >>> try:
        ...     try:
        ...         raise DatasetError("no volumes in /data")
        ...     except DatasetError as e:
        ...         raise RuntimeError("Failed to instantiate component") from e
        ... except RuntimeError as e:
        ...     print(find_miar_error(e))
        no volumes in /data
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MiarError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def sentence_for_user(error: BaseException, overwrite: str = "--overwrite") -> str:
    """Return the message of a command for an error, also for one that is not a `MiarError`.

    Args:
        error: what was raised.
        overwrite: the option of the command that allows overwriting.

    Example:
        >>> sentence_for_user(KeyError("x"))
        "unexpected KeyError ('x'); --debug shows where it happened: please report it."
        >>> sentence_for_user(ConfigurationError("fidelity is 3."))
        'fidelity is 3.'
    """
    if found := find_miar_error(error):
        return found.sentence(overwrite) if isinstance(found, ExistsError) else str(found)
    reason = (str(error).strip() or "without a message").splitlines()[0]
    return f"unexpected {type(error).__name__} ({reason}); --debug shows where it happened: please report it."


@contextmanager
def in_one_sentence(kind: type[MiarError], problem: str, advice: str) -> Iterator[None]:
    """Convert any error of a block to one sentence: libraries do not document what they raise for damaged files.

    Args:
        kind: class of the new error; a `MiarError` in the chain of causes is raised unchanged.
        problem: what was found and where; the message of the library is appended.
        advice: what is needed, and what to do.

    Example:
        >>> with in_one_sentence(ImageError, "a.nii is damaged", "copy it again."):
        ...     int("many")
        Traceback (most recent call last):
        miar_monai.errors.ImageError: a.nii is damaged (invalid literal for int() with base 10: 'many'): copy it again.
    """
    try:
        yield
    except MiarError:
        raise
    except Exception as error:
        if found := find_miar_error(error):
            raise found from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise kind(f"{problem} ({reason}): {advice}") from error


def report_errors_in_one_sentence() -> None:
    """Print an uncaught `MiarError` as ``error: <sentence>`` instead of a traceback; the exit code is still 1.

    The bundles call this in ``initialize``, since ``monai.bundle run`` catches nothing. Any other exception is a defect
    and keeps its traceback.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if find_miar_error(error) is None:
            previous(kind, error, traceback)
        else:
            print(f"error: {sentence_for_user(error, '--overwrite True')}", file=sys.stderr)

    sys.excepthook = hook


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check that a setting is a number within a range.

    Raises:
        SettingError: if ``value`` is not a number within [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise SettingError(f"{name} is {value!r}, but it must lie between {low} and {high}; correct the setting.")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that a setting is one of several words.

    Raises:
        SettingError: if ``value`` is not among ``choices``.
    """
    choices = tuple(choices)
    if value not in choices:
        raise SettingError(f"{name} is {value!r}, but it must be one of {', '.join(choices)}; correct the setting.")


def check_whole(name: str, value: float) -> None:
    """Check that a setting is a whole number, of any numeric type.

    Raises:
        SettingError: if it is not.
    """
    if not isinstance(value, Real) or value % 1:
        raise SettingError(f"{name} is {value!r}, but it must be a whole number; correct the setting.")
