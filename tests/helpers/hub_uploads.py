"""The part of the local hub that takes models: accounts, new repositories, files, and commits."""

import base64
import json
import re
from pathlib import Path
from typing import Any

WHO = "/api/whoami-v2"
PATTERNS = {
    "create": re.compile(r"/api/repos/create"),
    "validate": re.compile(r"/api/validate-yaml"),
    "modes": re.compile(r"/api/models/([^/]+/[^/]+)/preupload/main"),
    "batch": re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "large": re.compile(r"/large/([0-9a-f]{64})"),
    "commit": re.compile(r"/api/models/([^/]+/[^/]+)/commit/main"),
}


class Uploads:
    """What the server was given. A repository's files are in `folder`/owner/name."""

    def __init__(self, folder: Path, account: str = "me") -> None:
        self.folder, self.account = folder, account
        self.private: dict[str, bool] = {}
        """Whether each repository that was created is private."""
        self.rejects = False
        """Whether commits fail."""
        self.role = "write"
        """The rights of the token."""
        self.large: dict[str, bytes] = {}
        """Large files by checksum, before a commit names them."""

    def answer(self, path: str, body: bytes, url: str) -> tuple[int, Any] | None:
        """Return the status and the JSON that answer a request; None if it is not about an upload."""
        if path == WHO:
            orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
            auth = {"accessToken": {"displayName": "x", "role": self.role}}
            return 200, {"type": "user", "name": self.account, "orgs": orgs, "auth": auth}
        for action, pattern in PATTERNS.items():
            if found := pattern.fullmatch(path):
                return getattr(self, f"_{action}")(found, body, url)
        return None

    def _create(self, found: re.Match[str], body: bytes, url: str) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.account}/{asked['name']}"
        if name in self.private:
            return 409, {"error": "You already created this model repo", "url": f"{url}/{name}"}
        self.private[name] = asked.get("private", asked.get("visibility") == "private")
        (self.folder / name).mkdir(parents=True)
        return 200, {"url": f"{url}/{name}", "name": name}

    def _validate(self, found: re.Match[str], body: bytes, url: str) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def _modes(self, found: re.Match[str], body: bytes, url: str) -> tuple[int, Any]:
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        return 200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def _batch(self, found: re.Match[str], body: bytes, url: str) -> tuple[int, Any]:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{url}/large/{entry['oid']}", "header": {}}}}
            for entry in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def _large(self, found: re.Match[str], body: bytes, url: str) -> tuple[int, Any]:
        self.large[found[1]] = body
        return 200, {}

    def _commit(self, found: re.Match[str], body: bytes, url: str) -> tuple[int, Any]:
        if self.rejects:
            return 403, {"error": "Storage quota reached"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "deletedFile":
                (self.folder / found[1] / value["path"]).unlink()
                continue
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
            else:
                continue
            target = self.folder / found[1] / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return 200, {"commitUrl": f"{url}/{found[1]}/commit/{'1' * 40}", "commitOid": "1" * 40}
