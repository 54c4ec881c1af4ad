"""A real HTTP server in a thread, whose replies a test scripts, and `transformers serve` with a real model."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from var.utils.http_client import Client


@dataclass(frozen=True)
class Broken:
    """A raw response, or the lack of one."""

    status: int = 200
    text: str = ""  # the body
    cut: int = 0  # number of announced bytes that are not sent
    slow: float = 0.0  # seconds before the response
    drop: bool = False  # close the connection without a response
    retry_after: float | str = 0.01  # seconds; the openai client waits for them instead of its own 0.4 to 8 seconds
    drip: float = 0.0  # seconds between the bytes of the body
    headers: Mapping[str, str] = field(default_factory=dict)  # further headers
    data: bytes = b""  # the body, in place of `text`


@dataclass
class Asked:
    """The requests that a server received, in order of arrival."""

    base_url: str  # address of the server
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)  # Authorization headers
    headers: list[dict[str, str]] = field(default_factory=list)  # with names in lower case
    times: list[float] = field(default_factory=list)  # seconds
    peak: int = 0  # maximum number of pending requests
    now: int = 0  # number of pending requests


class Server(ThreadingHTTPServer):
    """A server that accepts many connections at once: with the default queue of 5 some would wait a second."""

    daemon_threads = True
    request_queue_size = 64


@contextmanager
def served(reply: Callable[[dict[str, Any], int], Any]) -> Iterator[Asked]:
    """Serve `reply(body, number of earlier requests with this body)`, a JSON value or `Broken`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet; else each response waits 40 ms
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = asked.bodies.count(body)
                asked.bodies.append(body)
                asked.paths.append(self.path)
                asked.keys.append(self.headers["Authorization"])
                asked.headers.append({name.lower(): value for name, value in self.headers.items()})
                asked.times.append(time.monotonic())
                asked.now += 1
                asked.peak = max(asked.peak, asked.now)
            value = reply(body, before)
            how = value if isinstance(value, Broken) else Broken(text=json.dumps(value))
            time.sleep(how.slow)
            with lock:
                asked.now -= 1
            if how.drop:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            data = how.data or how.text.encode()
            self.send_response(how.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", str(how.retry_after))
            for name, text in how.headers.items():
                self.send_header(name, text)
            self.end_headers()
            if how.drip:
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(how.drip)
            else:
                self.wfile.write(data[: len(data) - how.cut])
            self.close_connection = how.cut > 0

        def log_message(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # tests kill clients on purpose
    asked = Asked(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def client(url: str, folder: Path, **options: Any) -> Client:
    """Return a client of a test server that caches replies in `folder`."""
    settings = {"model": "judge", "api_key_env": None, "retries": 1, "timeout": 20.0, "cache": str(folder), **options}
    return Client(base_url=url, **settings)


def completion(text: Any, finish: str = "stop", reasoning: dict[str, Any] | None = None, **choice: Any) -> Any:
    """Return a chat completion with 10 prompt tokens and 5 completion tokens.

    reasoning: further fields of the message, such as reasoning_content. choice: further keys, such as logprobs.
    """
    message = {"role": "assistant", "content": text, **(reasoning or {})}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two answers, written by a test as <answer …>, in the order in which the judge sees them."""
    first, second = re.findall(r"<answer.*?>", body["messages"][-1]["content"], flags=re.DOTALL)
    return first, second


@contextmanager
def serve_model(folder: Path, log: Path) -> Iterator[str]:
    """Run `transformers serve` with a model on the CPU; yield its address. Skip the test if its packages are missing.

    log: the file of what the server prints.
    """
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="transformers serve needs pip install 'transformers[serving]'")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
