"""An interrupted download, from a local server with as much of the hub's protocol as the download needs."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import pretrained
from tests.helpers.runs import ROOT

COMMIT = "c" * 40
LOOK = (
    "import sys; from var.models.pretrained import Pretrained; from var.utils.errors import UserError\n"
    "files = Pretrained(name='m', path='someone/model', revision=None, chat_template=None, dtype='float32', "
    "attention='packed', trust_remote_code=False, gradient_checkpointing=False, architecture={}, cache=sys.argv[1])\n"
    "try: print(sum(p.numel() for p in files.load().parameters()), files.weights)\n"
    "except UserError as error: print('ERROR', error)\n"
)


class Hub(ThreadingHTTPServer):
    """Serve a folder as someone/model.

    If `cut` is set, the connection breaks after that many bytes of a .safetensors file, and requests to resume fail.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.cut, self.asked = folder, None, list[str]()
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Any

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/someone/model"):
            files = sorted(self.server.folder.iterdir())
            listing: Any = {
                "id": "someone/model",
                "sha": COMMIT,
                "siblings": [{"rfilename": file.name} for file in files],
            }
            if "/tree/" in path:
                listing = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            self.send(json.dumps(listing).encode(), body, {"Content-Type": "application/json"})
            return
        file = self.server.folder / path.rpartition("/")[2]
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        self.server.asked.append(f"{self.command} {file.name}")
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        tags = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if begin and self.server.cut is not None:
            self.send_error(403)
            return
        broken = body and file.suffix == ".safetensors" and self.server.cut is not None
        cut = self.server.cut if broken else None
        self.send(data[begin:], body, tags, cut, partial=begin > 0, total=len(data))

    def send(
        self, data: bytes, body: bool, headers: dict[str, str], cut: int | None = None, partial: bool = False,
        total: int = 0,
    ) -> None:  # fmt: skip
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {total - len(data)}-{total - 1}/{total}")
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[Hub]:
    server = Hub(tiny_folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load_in_process(hub: Hub, home: Path) -> str:
    """Load someone/model in a new process; return its number of parameters and hash, or its error."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(home / "cache")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.long
def test_interrupted_download_raises_and_completes_later(hub: Hub, tiny_folder: Path, tmp_path: Path) -> None:
    """A truncated file is never read as a model."""
    hub.cut = 1000
    output = load_in_process(hub, tmp_path)
    assert output.startswith("ERROR model.path: someone/model is not on this machine and could not be down"), output
    assert "GET model.safetensors" in hub.asked
    hub.cut = None
    output = load_in_process(hub, tmp_path)
    assert "ERROR" not in output, output
    parameters, weights = output.split()
    expected = pretrained(tiny_folder, tmp_path)
    assert int(parameters) == sum(p.numel() for p in expected.load().parameters())
    assert weights == expected.weights
    hub.asked.clear()
    hub.shutdown()
    hub.server_close()
    assert load_in_process(hub, tmp_path).split() == [parameters, weights]  # files on disk need no hub
    assert hub.asked == []
