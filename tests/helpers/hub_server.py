"""A local server that speaks the Hugging Face hub's protocol for files, so that real clients download from it."""

import hashlib
import json
import os
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_uploads import Uploads
from tests.helpers.runs import ROOT

TOKEN = "hf_" + "x" * 34
API = re.compile(
    r"/api/(models|datasets|spaces)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|auth-check)(?:/([^/]+)(?:/(.*))?)?)?"
)
FILE = re.compile(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Repository:
    """A folder that is served as a repository with one commit, its branch main."""

    folder: Path
    gated: bool = False  # its files need TOKEN
    private: bool = False  # without TOKEN it looks as if it were absent

    @property
    def commit(self) -> str:
        """The commit's hash, which depends on the content."""
        content = [[name, hashlib.sha256(file.read_bytes()).hexdigest()] for name, file in self.files().items()]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        """Return the files by their path in the repository."""
        found = (file for file in sorted(self.folder.rglob("*")) if file.is_file())
        return {file.relative_to(self.folder).as_posix(): file for file in found}


@dataclass
class Hub:
    """What a server offers, what it was asked, and what it breaks."""

    url: str = ""
    prefix: str = ""  # path before all addresses, as a mirror may have
    models: dict[str, Repository] = field(default_factory=dict)  # by owner/name
    datasets: dict[str, Repository] = field(default_factory=dict)  # by owner/name
    spaces: dict[str, Repository] = field(default_factory=dict)  # by owner/name
    breaks: dict[str, int] = field(default_factory=dict)  # by file: break the next download after so many bytes
    uploads: Uploads | None = None  # takes models; None: it takes none
    keeps_breaking: bool = False  # break later downloads of these files too, before the first byte
    requests: Counter[str] = field(default_factory=Counter)  # by `GET owner/name/file`, `HEAD …` or `GET /api/…`
    sent: Counter[str] = field(default_factory=Counter)  # bytes by owner/name/file

    def downloads(self, suffix: str = "") -> list[str]:
        """Return the files that were downloaded, as owner/name/file, whose name ends with `suffix`."""
        return sorted(name for name, size in self.sent.items() if size and name.endswith(suffix))

    def forget(self) -> None:
        """Forget what was asked so far."""
        self.requests.clear()
        self.sent.clear()


@contextmanager
def serve_hub(**options: Any) -> Iterator[Hub]:
    """Serve repositories until the `with` block ends. The options are fields of `Hub`."""
    hub = Hub(**options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            answer(self, hub)

        def do_GET(self) -> None:
            answer(self, hub)

        def do_POST(self) -> None:
            answer(self, hub)

        def do_PUT(self) -> None:
            answer(self, hub)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients are cut off on purpose
    hub.url = f"http://127.0.0.1:{server.server_port}{hub.prefix}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    """Answer one request as the hub does."""
    path, recursive = unquote(urlsplit(request.path).path), "recursive=true" in request.path.lower()
    body = read_body(request)
    if not path.startswith(hub.prefix):
        return fail(request, 404, "", "Not Found")
    path = path.removeprefix(hub.prefix)
    token = request.headers.get("Authorization")
    if token is not None and token != f"Bearer {TOKEN}":
        return fail(request, 401, "", "Invalid credentials in Authorization header")
    if hub.uploads is not None and (taken := hub.uploads.answer(path, body, hub.url)) is not None:
        return send(request, json.dumps(taken[1]).encode(), {}, taken[0])
    form = body.decode()
    found = API.fullmatch(path) or FILE.fullmatch(path)
    if found is None:
        return fail(request, 404, "", "Not Found")
    if found.re is API:
        kind, name, action, revision, rest = found.groups()
    else:
        kind, name, revision, rest = found.groups()
        action = "resolve"
    repositories = {"datasets": hub.datasets, "spaces": hub.spaces}.get((kind or "").rstrip("/"), hub.models)
    allowed = token is not None
    repository = repositories.get(name)
    if repository is None and hub.uploads is not None and name in hub.uploads.private:
        repository = Repository(hub.uploads.folder / name, private=hub.uploads.private[name])
    if repository is None or (repository.private and not allowed):  # without a token the hub does not say which
        return fail(request, 404 if allowed else 401, "RepoNotFound" if allowed else "", "Repository not found")
    if revision not in (None, "main", repository.commit):
        return fail(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if repository.gated and not allowed and action in ("resolve", "auth-check"):
        return fail(request, 401, "GatedRepo", f"Access to model {name} is restricted.")
    if action != "resolve":
        hub.requests[f"{request.command} {path}"] += 1
        listed: Any
        if action == "paths-info":
            asked = parse_qs(form).get("paths", []) if "=" in form else json.loads(form)["paths"]
            listed = [entry for entry in list_tree(repository, "", True) if entry["path"] in asked]
        elif action == "tree":
            listed = list_tree(repository, rest or "", recursive)
            if rest and not listed:
                return fail(request, 404, "EntryNotFound", f"{rest} does not exist")
        else:
            listed = {} if action == "auth-check" else describe(repository, name)
        return send(request, json.dumps(listed).encode(), {})
    return send_file(request, hub, repository, name, rest)


def read_body(request: BaseHTTPRequestHandler) -> bytes:
    """Return the body of a request, which may come in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline(), 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


def describe(repository: Repository, name: str) -> dict[str, Any]:
    """Return what the hub's API says about a repository."""
    return {
        "_id": "0" * 24, "id": name, "sha": repository.commit, "private": repository.private, "tags": [],
        "gated": "manual" if repository.gated else False, "disabled": False, "downloads": 0, "likes": 0,
        "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": path} for path in repository.files()],
    }  # fmt: skip


def list_tree(repository: Repository, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the files and folders in `folder`, "" for the top, as the hub's API lists them."""
    entries = dict[str, dict[str, Any]]()
    for path, file in repository.files().items():
        for parent in [p.as_posix() for p in Path(path).parents][:-1]:
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
        size = file.stat().st_size
        entries[path] = {"type": "file", "path": path, "size": size, "oid": "0" * 40}
        if is_large(path):
            entries[path]["lfs"] = {"oid": checksum(file), "size": size, "pointerSize": 134}
    below = {path: entry for path, entry in entries.items() if not folder or path.startswith(f"{folder}/")}
    depth = len(Path(folder).parts) + 1
    return [entry for path, entry in sorted(below.items()) if recursive or len(Path(path).parts) == depth]


def is_large(path: str) -> bool:
    """Return whether the hub keeps a file in its storage for large files, which lists a checksum."""
    return path.endswith((".safetensors", ".parquet"))


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def send_file(request: BaseHTTPRequestHandler, hub: Hub, repository: Repository, name: str, path: str) -> None:
    """Send a file, or the part of it that a Range header asks for. Break it off if a test wants that."""
    file, where = repository.files().get(path), f"{name}/{path}"
    hub.requests[f"{request.command} {where}"] += 1
    if file is None:
        return fail(request, 404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
    data = file.read_bytes()
    etag = f'"{checksum(file)}"'
    headers = {"X-Repo-Commit": repository.commit, "ETag": etag, "Accept-Ranges": "bytes"}
    if is_large(path):
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": etag}
    begin = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
    if begin:
        headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
    cut = None
    if request.command == "GET" and path in hub.breaks:
        cut = hub.breaks[path]
        if hub.keeps_breaking:
            hub.breaks[path] = 0
        else:
            del hub.breaks[path]
    body = data[begin:][:cut]
    if request.command == "GET":
        hub.sent[where] += len(body)
    send(request, data[begin:], headers, 206 if begin else 200, cut)
    return None


def send(
    request: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], status: int = 200, cut: int | None = None
) -> None:
    """Send a response, only its first `cut` bytes if set."""
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data[:cut])
    if cut is not None:
        request.close_connection = True
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)


def fail(
    request: BaseHTTPRequestHandler, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> None:
    """Send an error with the hub's headers."""
    named = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
    named = {name: value for name, value in named.items() if value}
    send(request, json.dumps({"error": message}).encode(), named, status)


def write_repositories(folder: Path) -> tuple[dict[str, Repository], dict[str, Repository]]:
    """Write tiny models and a data set with the names and the layout of the paper's; return models and data sets.

    Qwen2.5-7B has a chat template, the Llama has none, and the reward model's weights are in several files.
    """
    import datasets
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

    from notebooks.tiny import SIZES, byte_tokenizer
    from tests.helpers.models import saved, spread, tiny_config

    torch.manual_seed(0)
    qwen = spread(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)))
    llama = spread(LlamaForCausalLM(tiny_config()))
    scorer = spread(LlamaForSequenceClassification(tiny_config(num_labels=1, pad_token_id=0)))
    saved(folder / "qwen", qwen)
    saved(folder / "llama", llama, byte_tokenizer(template=None))
    scorer.save_pretrained(folder / "rm", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder / "rm")
    pairs = [
        {"instruction": f"Question {i}?", "output_1": f"yes {i}", "output_2": f"no, {i} of them", "label": 1 + i % 2}
        for i in range(24)
    ]
    table = datasets.Dataset.from_list(pairs)
    (folder / "offsetbias" / "data").mkdir(parents=True)
    table.to_parquet(folder / "offsetbias" / "data" / "train-00000-of-00001.parquet")
    (folder / "offsetbias" / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n# OffsetBias\n")
    models = {
        "Qwen/Qwen2.5-7B": Repository(folder / "qwen"),
        "someone/llama": Repository(folder / "llama"),
        "gated/llama": Repository(folder / "llama", gated=True),
        "NCSOFT/Llama-3-OffsetBias-RM-8B": Repository(folder / "rm"),
        "gated/rm": Repository(folder / "rm", gated=True),
    }
    sets = {
        "NCSOFT/offsetbias": Repository(folder / "offsetbias"),
        "gated/pairs": Repository(folder / "offsetbias", gated=True),
    }
    return models, sets


def client_environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that uses the server, with an empty cache in `home` and no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
        **more,
    }  # fmt: skip
