"""An endpoint on this machine: a real HTTP server in a thread, whose replies a test scripts."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from var.utils.http_client import Client


@dataclass(frozen=True)
class Broken:
    """What a server can do in place of an answer.

    text: the body as it is; cut: so many bytes fewer than announced; slow: seconds before; drop: closes without a
    word; retry_after: seconds, that header, which the openai client waits for in place of its own 0.4 to 8 seconds.
    """

    status: int = 200
    text: str = ""
    cut: int = 0
    slow: float = 0.0
    drop: bool = False
    retry_after: float = 0.01


@dataclass
class Asked:
    """base_url: where it listens; bodies, paths, keys: what it was asked, in the order of arrival; peak: the most
    requests that were under way at once."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    peak: int = 0
    now: int = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # by default 5: of eight connections at once some wait a second for their next try


@contextmanager
def served(reply: Callable[[dict[str, Any], int], Any]) -> Iterator[Asked]:
    """reply(body, how many times this body came before) → a JSON value or Broken."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet, or each answer waits 40 ms
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                before = asked.bodies.count(body)
                asked.bodies.append(body)
                asked.paths.append(self.path)
                asked.keys.append(self.headers["Authorization"])
                asked.times.append(time.monotonic())
                asked.now += 1
                asked.peak = max(asked.peak, asked.now)
            given = reply(body, before)
            how = given if isinstance(given, Broken) else Broken(text=json.dumps(given))
            time.sleep(how.slow)
            with lock:
                asked.now -= 1
            if how.drop:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            data = how.text.encode()
            self.send_response(how.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", str(how.retry_after))
            self.end_headers()
            self.wfile.write(data[: len(data) - how.cut])
            self.close_connection = how.cut > 0

        def log_message(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that gave up or was killed is part of the tests
    asked = Asked(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def client(url: str, folder: Path, **options: Any) -> Client:
    """Of such a server, with its replies in `folder`."""
    settings = {"model": "judge", "api_key_env": None, "retries": 1, "timeout": 20.0, "cache": str(folder), **options}
    return Client(base_url=url, **settings)


def completion(text: str | None, finish: str = "stop", **choice: Any) -> dict[str, Any]:
    """A chat completion that says `text`, of 10 tokens in and 5 out. choice: as logprobs, in the choice beside it."""
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers in the order in which the judge sees them; a test writes them as <answer …>."""
    first, second = re.findall(r"<answer.*?>", body["messages"][-1]["content"], flags=re.DOTALL)
    return first, second
