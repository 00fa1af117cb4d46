"""Shared servers; the images are small, for two CPU cores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.phantoms import write_nifti_phantom
from scipy.spatial.transform import Rotation
from servers import Server, label_server, miar

SHAPE = (48, 40, 2)
IMAGES = [f"head{i}" for i in range(4)]


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the app, as described in the documentation."""
    return Path(shutil.copytree(miar("label-app"), tmp_path_factory.mktemp("app") / "miar"))


def fill_studies(folder: Path) -> Path:
    """Write four heads of int16, and two of float32: one that is rotated, one that is sheared."""
    for i, name in enumerate(IMAGES):
        write_nifti_phantom(folder / f"{name}.nii.gz", SHAPE, seed=i)
    rotation = Rotation.from_euler("xz", [10, 5], degrees=True).as_matrix()
    shear = np.array([[0.9, 0.1, 0], [-0.1, 0.9, 0.2], [0, -0.05, 2]])
    for name, matrix in (("rotated", rotation @ np.diag([0.9, 0.8, 2])), ("sheared", shear)):
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = matrix, (-20, -15, 7)
        write_nifti_phantom(folder / f"{name}.nii", SHAPE, affine=affine, dtype="float32", seed=7, high=3)
    return folder


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_studies(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="session")
def server(app: Path, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server with both bundles and a folder of studies, which must not crash during the tests."""
    with label_server(app, studies, tmp_path_factory.mktemp("server")).running() as server:
        yield server
        assert server.process.poll() is None
