"""The unchanged bundles in MONAI Label's own app ``monaibundle``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from servers import ROOT, Server, label_server

from miar_monai.data.io import read_volume
from miar_monai.inference.resolver import SuperResolver


@pytest.fixture(scope="module")
def stock(studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server of the stock app with both bundles, unchanged."""
    source = Path(sys.prefix, "monailabel", "sample-apps", "monaibundle")
    app = shutil.copytree(source, tmp_path_factory.mktemp("app") / "monaibundle")
    for name in ("miar_brats", "miar_lidc"):
        shutil.copytree(ROOT / "bundles" / name, app / "model" / name)
    conf = ["models", "miar_brats,miar_lidc", "zoo_source", "ngc", "sam2", "false", "skip_trainers", "true"]
    with label_server(app, studies, tmp_path_factory.mktemp("stock"), *conf).running() as server:
        yield server


@pytest.mark.parametrize(("model", "image"), [("brats", "rotated"), ("lidc", "head1"), ("brats", "head2")])
@pytest.mark.parametrize("params", [{}, {"result_dtype": "uint8"}])
def test_the_result_is_that_of_the_command_on_the_finer_grid(
    stock: Server, studies: Path, model: str, image: str, params: dict[str, str]
) -> None:
    response = stock.infer(f"miar_{model}", image, result_extension=".nii", **params)
    assert response.status_code == 200, stock.log[-4000:]
    result = nib.Nifti1Image.from_bytes(response.content)
    (source,) = studies.glob(f"{image}.nii*")
    expected = SuperResolver(model, "cpu").volume(read_volume(source))
    assert result.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(result.dataobj), expected.array)
    assert np.allclose(result.affine, expected.affine, atol=1e-5)
    assert not list((ROOT / "bundles").glob("*/output"))
