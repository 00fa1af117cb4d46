"""What MIAR says to its users when something is wrong: one sentence each, never a traceback.

Every error says what was found and where, what is needed, and what to do. The classes also derive from the
built-in exception of the same meaning, so that callers who know nothing of MIAR can still handle them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from types import TracebackType

__all__ = [
    "OVERWRITE",
    "CheckpointError",
    "ConfigurationError",
    "DatasetError",
    "GeometryError",
    "ImageError",
    "MiarError",
    "MissingWeightsError",
    "OutputError",
    "SettingError",
    "check_range",
    "check_whole",
    "find_miar_error",
    "in_one_sentence",
    "report_errors_in_one_sentence",
    "sentence_for_user",
]

OVERWRITE = "(overwrite=True)"
"""How a message tells a caller from Python to allow overwriting; who prints it for a command says what to type."""


class MiarError(Exception):
    """Base of all errors that a user can mend; its text is meant to be read by a person."""


class ImageError(MiarError, ValueError):
    """An image cannot be used: unreadable, truncated, of the wrong dimension, not finite, constant."""


class GeometryError(MiarError, ValueError):
    """Positions in millimeters cannot be trusted: singular affine, missing slices, several series."""


class DatasetError(MiarError, ValueError):
    """A dataset folder or a split file is missing, empty, or not laid out as expected."""


class CheckpointError(MiarError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another network."""


class MissingWeightsError(MiarError, FileNotFoundError):
    """Weights of a metric or of a perceptual loss are not on this machine."""


class ConfigurationError(MiarError, ValueError):
    """A setting is unknown or out of range, or a config cannot be used."""


class SettingError(ConfigurationError):
    """A setting that a caller gave, a device or a model among them, is unknown or out of range."""


class OutputError(MiarError, OSError):
    """A result cannot be written, or would overwrite something."""


def find_miar_error(error: BaseException | None) -> MiarError | None:
    """Return the first `MiarError` in the chain of causes of ``error``, or None.

    MONAI and ignite wrap what a transform or a component raises; the sentence for the user is further down.

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
    """Return what the command tells a user about an error: ours, or what is unexpected and how to see more of it.

    Args:
        error: what was raised.
        overwrite: what the user types to allow overwriting.

    Example:
        >>> sentence_for_user(KeyError("x"))
        "unexpected KeyError ('x'); --debug shows where it happened: please report it."
        >>> sentence_for_user(OutputError(f"remove it, or allow overwriting {OVERWRITE}."))
        'remove it, or allow overwriting (--overwrite).'
    """
    if found := find_miar_error(error):
        return str(found).replace(OVERWRITE, f"({overwrite})")
    reason = (str(error).strip() or "without a message").splitlines()[0]
    return f"unexpected {type(error).__name__} ({reason}); --debug shows where it happened: please report it."


@contextmanager
def in_one_sentence(kind: type[MiarError], problem: str, advice: str) -> Iterator[None]:
    """Let any error of a block be a sentence: which ones a library raises at what is damaged, nobody documents.

    Args:
        kind: class of the error that is raised instead; a `MiarError` in the chain of causes is raised as it is.
        problem: what was found and where; the library's own reason follows it.
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
    """Make this process print a `MiarError` as ``error: <sentence>`` instead of a traceback; it still exits with 1.

    The bundles call this in ``initialize``, since ``monai.bundle run`` lets every exception through. All other
    exceptions are defects and keep their traceback.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if find_miar_error(error) is None:
            previous(kind, error, traceback)
        else:
            print(f"error: {sentence_for_user(error, '--overwrite True')}", file=sys.stderr)

    sys.excepthook = hook


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check a setting.

    Raises:
        ConfigurationError: if ``value`` is no number, or not within [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise SettingError(f"{name} is {value!r}, but it must lie between {low} and {high}; correct the setting.")


def check_whole(name: str, value: float) -> None:
    """Check that a setting is a whole number, of whatever type.

    Raises:
        ConfigurationError: if it is not; infinity is none.
    """
    if not isinstance(value, Real) or value % 1:
        raise SettingError(f"{name} is {value!r}, but it must be a whole number; correct the setting.")
