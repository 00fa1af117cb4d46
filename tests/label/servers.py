"""Real servers on loopback: MONAI Label with an app, and Orthanc as the PACS behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Server:
    """An HTTP server on loopback.

    Args:
        command: starts it; ``{port}`` stands for its port.
        folder: working directory, with the log.
        health: path that responds when the server is ready.
        env: added to the environment.
    """

    def __init__(self, command: list[str], folder: Path, health: str, **env: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [part.replace("{port}", str(self.port)) for part in command]
        self.folder, self.health, self.env = folder, health, env
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> str:
        """The output of the process."""
        return (self.folder / "out.log").read_text(errors="replace")

    def start(self) -> None:
        with (self.folder / "out.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env={**os.environ, **self.env}, stdout=log, stderr=log
            )
        for _ in range(600):
            assert self.process.poll() is None, self.log[-4000:]
            try:
                requests.get(self.url + self.health, timeout=10).raise_for_status()
                return
            except requests.ConnectionError:
                time.sleep(0.1)
        raise AssertionError(self.log[-4000:])

    def stop(self) -> None:
        """Terminate the process, or kill it after 20 seconds."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    @contextmanager
    def running(self) -> Iterator[Server]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def left_behind(self) -> list[Path]:
        """Return temporary files that a MONAI Label server has not removed within ten seconds."""
        for _ in range(100):
            if not (left := list((self.folder / "tmp").glob("miar-*"))):
                break
            time.sleep(0.1)
        return left

    def infer(self, model: str, image: str, output: str = "image", **params: Any) -> requests.Response:
        """Send a request as OHIF does."""
        fields = {"params": (None, json.dumps(params))}
        return requests.post(f"{self.url}/infer/{model}?image={image}&output={output}", files=fields, timeout=300)


def label_server(app: Path, studies: Path | str, folder: Path, *conf: str, **env: str) -> Server:
    """Return a MONAI Label server that writes only to ``folder`` and to the app."""
    options = ["--app", str(app), "--studies", str(studies), "--host", "127.0.0.1", "--port", "{port}"]
    for name, value in zip(conf[::2], conf[1::2], strict=True):
        options += ["--conf", name, value]
    (folder / "tmp").mkdir(parents=True)
    places = {"MONAI_LABEL_SESSION_PATH": "sessions", "MONAI_LABEL_DICOMWEB_CACHE_PATH": "pacs", "TMPDIR": "tmp"}
    variables = {name: str(folder / place) for name, place in places.items()}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "monailabel.main", "start_server", *options]
    return Server(command, folder, "/info/", PYTHONPATH=path, **variables, **env)


def orthanc_server(program: str, folder: Path) -> Server:
    """Return an Orthanc with DICOMweb and an empty store, on loopback only."""
    folder.mkdir(parents=True)
    server = Server([program, "orthanc.json"], folder, "/system")
    settings = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "HttpPort": server.port,
        "HttpBindAddresses": ["127.0.0.1"],
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    return server


def miar(*arguments: str | Path) -> str:
    """Run the command ``miar`` and return its output."""
    command = [sys.executable, "-m", "miar_monai.cli.main", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env, timeout=300).stdout.strip()
