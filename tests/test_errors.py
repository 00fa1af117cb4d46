from __future__ import annotations

import subprocess
import sys

import pytest

from miar_monai import errors
from miar_monai.errors import ExistsError, MiarError, OutputError, find_miar_error, sentence_for_user

ALL = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
CLASSES = [kind for kind in ALL if kind is not ExistsError]  # whose message is made of the path
SCRIPT = """
from miar_monai.errors import GeometryError, report_errors_in_one_sentence
report_errors_in_one_sentence()
try:
    {inner}
except Exception as error:
    raise RuntimeError("Failed to instantiate component") from error
"""


def run(inner: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT.format(inner=inner)], capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_ours_and_also_a_builtin_one_that_keeps_its_text(kind: type[MiarError]) -> None:
    assert issubclass(kind, MiarError)
    builtin = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    assert kind is MiarError or builtin[0] not in (Exception, BaseException, object)
    assert str(kind("a.nii.gz: one sentence.")) == "a.nii.gz: one sentence."


def test_an_existing_file_is_named_with_the_option_of_the_caller() -> None:
    error = ExistsError("a.nii.gz")
    assert isinstance(error, OutputError)
    assert str(error).startswith("a.nii.gz exists already")
    assert str(error).endswith("(overwrite=True).")
    assert sentence_for_user(error).endswith("(--overwrite).")
    assert sentence_for_user(error, "--overwrite True").endswith("(--overwrite True).")


def test_an_error_of_this_package_is_found_anywhere_in_the_chain() -> None:
    known, wrapped, outermost = errors.ImageError("known"), ValueError("wrapped"), RuntimeError("outermost")
    wrapped.__cause__ = known
    outermost.__context__ = wrapped
    assert find_miar_error(outermost) is known
    assert find_miar_error(known) is known


def test_a_circular_chain_without_an_error_of_this_package_ends() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert find_miar_error(one) is None
    assert find_miar_error(None) is None


def test_a_user_sees_one_sentence_and_a_nonzero_exit() -> None:
    done = run("raise GeometryError('a.nii.gz: the affine is singular.')")
    assert done.returncode == 1
    assert done.stderr == "error: a.nii.gz: the affine is singular.\n"


def test_a_defect_keeps_its_traceback() -> None:
    done = run("1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
