"""Set-up of all tests: one thread, one seed, no network, and the same examples of properties in each run."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# before torch, pyiqa, mlflow and their subprocesses read them
os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", HF_HUB_OFFLINE="1", DO_NOT_TRACK="true")

import numpy as np
import pytest
import torch
from helpers.weights import need
from hypothesis import settings
from monai.utils import set_determinism

from miar_monai.degradation import SeparableOperator
from miar_monai.evaluation.metrics import METRICS

# the tests of the MONAI Label app need MONAI Label, and so an environment of their own: make test-label
collect_ignore = [] if find_spec("monailabel") else ["label"]

torch.set_num_threads(1)
settings.register_profile("miar", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("miar")

# where the tests that need weights look for them; for all other tests there are none on any machine
WEIGHTS_HOME = os.environ.get("TORCH_HOME", str(Path(__file__).parents[2] / "shared" / "weights"))
LOOPBACK = ("localhost", "127.", "::1", "0.0.0.0")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Start every test from the same random state and take back MONAI's global switch afterwards."""
    set_determinism(seed=0)
    yield
    set_determinism(seed=None)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Let a test that asks the network for anything fail, wherever it runs."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def refuse_strangers(host: Any) -> None:
        if isinstance(host, str) and not host.startswith(LOOPBACK) and host != socket.gethostname():
            raise AssertionError(f"a test tried to reach {host!r}; tests must work without a network")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            refuse_strangers(address[0])
        connect(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_strangers(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def _no_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test find the same weights, none, on every machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "no_weights"))


@pytest.fixture
def weights_home(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the real ``TORCH_HOME`` (or ``../shared/weights``), which is in force during the test."""
    monkeypatch.setenv("TORCH_HOME", WEIGHTS_HOME)
    return Path(WEIGHTS_HOME)


@pytest.fixture
def lpips_weights(weights_home: Path) -> None:
    """Let lpips find its weights, or skip the test."""
    pytest.importorskip("lpips")
    need(weights_home, *METRICS["LPIPS"].weights)


@pytest.fixture
def rng() -> np.random.Generator:
    """Return the generator of a test's random numbers."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real volumes (``MIAR_TEST_DATA`` or ``../shared/data``), or skip the test."""
    folder = Path(os.environ.get("MIAR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set MIAR_TEST_DATA to a folder that has some")
    return folder


@pytest.fixture
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave results as dark as they are, which at inference are no darker than their slice."""
    monkeypatch.setattr(SeparableOperator, "bounded", lambda self, x, floor: x)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle for brain MRI with a tiny network."""
    from helpers.tiny_bundle import write_tiny_bundle

    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, and leave the hook for errors as it is."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def phantom(rng: np.random.Generator) -> torch.Tensor:
    """Return a smooth object with an edge and some texture on a black background, (1, 37, 31, 7) in [0, 1]."""
    x, y, z = np.meshgrid(np.linspace(-1, 1, 37), np.linspace(-1, 1, 31), np.linspace(-0.5, 0.5, 7), indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.7) ** 2 + z**2 < 1
    texture = 0.6 + 0.2 * np.sin(9 * x + 4 * z) * np.cos(7 * y) + 0.02 * rng.standard_normal(x.shape)
    return torch.as_tensor(np.clip(body * texture, 0, 1), dtype=torch.float32)[None]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that collects all saved figures."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures
