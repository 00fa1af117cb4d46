"""The part of Hugging Face's server that `monai.bundle.download` uses, on loopback, with one repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


@contextmanager
def serve_repository(folder: Path, repo: str, version: str) -> Iterator[str]:
    """Serve a folder as a repository with one commit, which has a version as its tag, and yield the URL."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    pages = {
        f"/api/models/{repo}/refs": {
            "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}],
            "converts": [],
            "tags": [{"name": version, "ref": f"refs/tags/{version}", "targetCommit": COMMIT}],
        },
        f"/api/models/{repo}/revision/{version}": {"id": repo, "sha": COMMIT, "private": False, "tags": []},
        f"/api/models/{repo}/tree/{COMMIT}": [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name, path in files.items()
        ],
    }

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            file = files.get(path.removeprefix(f"/{repo}/resolve/{COMMIT}/"))
            if file is None and path not in pages:
                self.send_error(404)
                return
            content = file.read_bytes() if file else json.dumps(pages[path]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if file else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(path.encode()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
