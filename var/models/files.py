"""Find a model's files: in a folder, on the hub, or in an installed package. Hash its weights."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from var.config.run_files import read_mapping
from var.models.gguf import MODEL_PACKAGES, unpack
from var.models.structure import INDEX, read_index
from var.utils.errors import UserError, brief
from var.utils.files import atomic
from var.utils.hub import download_license, explain_failure, read_license

ADAPTER = "adapter_config.json"  # peft's file in a folder with an adapter; it names the base
SMALL = ["*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]  # config and tokenizer, as the hub names them
COPIES = ["consolidated*", "original/*"]  # the same weights again, in their author's format


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model by name. Nothing is downloaded before it is used.

    Attributes:
        name: Name of the model, for titles.
        path: Hub id, or a folder with a model or an adapter.
        key: The setting that `path` comes from, for messages.
        revision: Commit or tag of the hub; None is the newest.
        trust_remote_code: Whether code in the repository or the folder `path` may run.
        cache: Folder for unpacked models and for hashes of weights.
    """

    name: str
    path: str
    key: str = "model.path"
    revision: str | None
    trust_remote_code: bool
    cache: str = "~/.cache/var-align"

    def __post_init__(self) -> None:
        for name in ("path", "cache"):
            if (value := str(getattr(self, name))).startswith("~"):
                object.__setattr__(self, name, str(Path(value).expanduser()))

    @cached_property
    def config_folder(self) -> Path:
        """The folder with config and tokenizer: `path`, the hub's cache, or the unpacked package.

        In the hub's cache, the weights may be missing: `folder` downloads them.
        """
        if Path(self.path).is_dir():
            return Path(self.path)
        if self.path.startswith((".", "/", "~")):
            raise UserError(f"{self.typed} is not a folder. Check the path.")
        if self.package is None:
            return self._download(SMALL, self.revision)
        with suppress(UserError):  # prefer the hub's cache, but do not download a model that is installed
            folder = self._download([*SMALL, "*.safetensors"], self.revision, local_files_only=True)
            if has_weights(folder):
                return folder
        return unpack(self.package, Path(self.cache) / "models" / self.package)

    @cached_property
    def folder(self) -> Path:
        """`config_folder` with the weights, which are downloaded now if they are only on the hub."""
        folder = self.config_folder
        if self._is_complete:
            if (folder / INDEX).exists() and not (folder / "model.safetensors").exists():
                read_index(folder / INDEX)  # raises its errors
            return folder
        return self._download([*SMALL, "*.safetensors"], folder.name)  # the folder's name is a commit

    @property
    def _is_complete(self) -> bool:
        """Whether the weights are on this machine."""
        return Path(self.path).is_dir() or has_weights(self.config_folder)

    @property
    def package(self) -> str | None:
        """The installed package that contains the model, or None."""
        name = MODEL_PACKAGES[self.path].name if self.path in MODEL_PACKAGES else None
        return name if name and importlib.util.find_spec(name) else None

    @property
    def _is_unpacked(self) -> bool:
        return self.package is not None and (self.config_folder / "done").exists()

    @property
    def location(self) -> tuple[str, str | None]:
        """Where the weights that are used are: a folder and None, or the hub id and the commit."""
        if Path(self.path).is_dir() or self._is_unpacked:
            return str(self.config_folder.resolve()), None
        return self.path, self.config_folder.name

    @property
    def origin(self) -> str:
        """The weights that are used, in words."""
        place, commit = self.location
        if self._is_unpacked:
            package = MODEL_PACKAGES[self.path]
            return (
                f"{self.path} as in the Python package {package.distribution} {version(package.distribution)}, "
                f"de-quantized from {package.quantization} (not the full-precision weights of the repository)"
            )
        return f"{place} at commit {commit}" if commit else place

    @property
    def license(self) -> str | None:
        """The license of the weights, from the package or the model card; None if it is not known here."""
        if self._is_unpacked:
            return MODEL_PACKAGES[self.path].license
        place, commit = self.location
        return read_license(place) if commit is None else download_license(place, commit)

    @property
    def typed(self) -> str:
        """What messages start with: the settings and their values."""
        revision = f" {self.group}.revision={self.revision}" if self.revision else ""
        return f"{self.key}={self.path}{revision}"

    @property
    def group(self) -> str:
        """The group of settings that `key` is in, such as `model` or `reward`."""
        return self.key.rpartition(".")[0]

    def _download(self, patterns: list[str], revision: str | None, local_files_only: bool = False) -> Path:
        """Download the files that match, unless the hub's cache has them, and return their folder."""
        from huggingface_hub import snapshot_download

        if self.trust_remote_code:
            patterns = [*patterns, "*.py"]
        with self._explain_download():
            folder = snapshot_download(
                self.path, revision=revision, allow_patterns=patterns, ignore_patterns=COPIES,
                local_files_only=local_files_only,
            )  # fmt: skip
            return Path(folder)

    @contextmanager
    def _explain_download(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the hub's client raises many types: offline, gated, misspelled
            package = f"install it with {MODEL_PACKAGES[self.path].install}" if self.path in MODEL_PACKAGES else ""
            advice = package or f"set {self.key} to a folder with the model"
            raise explain_failure(error, self.typed, self.path, advice) from error

    def hash_files(self, config: str, pattern: str) -> str:
        """Hash the folder's files, or read the hash from a note in the cache if the files are unchanged.

        Times of modification alone do not show a change: rsync -t and cp -p keep them. The inode and the time of the
        inode's last change cannot be set.
        """
        folder = self.config_folder
        if not self._is_complete:
            return self._combine(self._list_checksums(pattern), config)
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("consolidated"))
        if not files:
            raise UserError(f"{self.key}={folder}: it has no .safetensors file, and pickled weights are not read.")
        stats = [[f.name, *_identify(f.stat())] for f in [*files, folder / config]]
        stamp = _digest(json.dumps([str(folder.resolve()), stats]))
        note = Path(self.cache) / "hashes" / stamp
        found = ""
        with suppress(OSError, ValueError):  # a note that is missing or cannot be read
            found = note.read_text()
        fingerprint = found[:32]
        if found != fingerprint + _digest(stamp + fingerprint):  # also if a digit of the note is another one
            checksums = []
            for f in files:
                with f.open("rb") as data:
                    checksums.append(hashlib.file_digest(data, "sha256").digest())
            fingerprint = self._combine(checksums, config)
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic(note, shared=True) as file:
                file.write(fingerprint + _digest(stamp + fingerprint))
        return fingerprint

    def _list_checksums(self, pattern: str) -> list[bytes]:
        """Return the SHA-256 of each file with weights, from the hub's list of files."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self._explain_download():
            entries = list(HfApi().list_repo_tree(self.path, revision=self.config_folder.name))
        files = [entry for entry in entries if isinstance(entry, RepoFile) and fnmatch(entry.path, pattern)]
        found = {file.path: file.lfs for file in files if not file.path.startswith("consolidated")}
        if not found:
            raise UserError(f"{self.typed}: it has no .safetensors file, and pickled weights are not read.")
        return [bytes.fromhex(lfs.sha256) for _, lfs in sorted(found.items()) if lfs]  # the hub has LFS for large files

    def _combine(self, checksums: list[bytes], config: str) -> str:
        return _digest(b"".join([*checksums, (self.config_folder / config).read_bytes()]))

    def download_config(self) -> Path | None:
        """Download config.json alone and return its folder; None if the repository has none, as that of an adapter."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        with self._explain_download():
            try:
                return Path(hf_hub_download(self.path, "config.json", revision=self.revision)).parent
            except EntryNotFoundError as error:
                if not isinstance(error, HfHubHTTPError):  # offline
                    raise
                return None

    @contextmanager
    def explain_reading(self, what: str) -> Iterator[None]:
        """Raise a UserError with our settings in place of transformers' errors: about code in a repository, or `what`.

        what: the file that is read, or "weights", whose other errors are raised unchanged.
        """
        try:
            yield
        except Exception as error:  # also of tokenizers and of the checks of a config, which have types of their own
            if isinstance(error, UserError):
                raise
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{self.path} contains its own code, which runs only if this is model.path, with "
                    "model.trust_remote_code=true. The code of init, reference, the base of an adapter and a reward "
                    "model never runs."
                ) from error
            if "does not recognize this architecture" in str(error):
                raise UserError(
                    f"{self.typed}: this version of transformers does not know the model's architecture. Update it: "
                    "pip install -U transformers."
                ) from error
            if what == "weights" and "allocate memory" in str(error):  # of torch, which would make missing weights
                raise UserError(
                    f"{self.typed}: its weights need more memory than there is, or the sizes in config.json are not "
                    f"those of its weights ({brief(error)})."
                ) from error
            if what == "weights" and not isinstance(error, OSError | SafetensorError):
                raise
            if what == "weights" and not has_weights(self.config_folder):
                raise UserError(
                    f"{self.typed}: it has no .safetensors file, and pickled weights are not read."
                ) from error
            raise UserError(f"{self.typed}: its {what} cannot be read ({brief(error)}). Restore this file.") from error


def _identify(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:32]


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights: all files that its index lists, or any if it has no index."""
    if not (index := folder / INDEX).exists():
        return any(folder.glob("*.safetensors"))
    return all((folder / name).exists() for name in set(read_index(index).values()))


def find_model(run: str, key: str = "init") -> Path:
    """Return the folder of the model that a run exported; `run` may also be the folder of a model or a LoRA adapter.

    key is the setting in messages. Raises a UserError for a folder without a model, and for a reward model.
    """
    if not run:
        raise UserError(f"{key} is empty (unset shell variable?). Use {key}=null for none.")
    for folder in (Path(run).expanduser() / "model", Path(run).expanduser()):
        if (folder / ADAPTER).exists():
            if read_mapping(folder / ADAPTER).get("task_type") == "SEQ_CLS":
                raise UserError(f"{key}={run} is the adapter of a reward model. Use that of a language model.")
            return folder
        if (folder / "config.json").exists():
            kinds = read_mapping(folder / "config.json").get("architectures") or [""]
            if str(kinds[0] if isinstance(kinds, list) else kinds).endswith("ForSequenceClassification"):
                raise UserError(
                    f"{key}={run} is a reward model. To score with it, use reward=classifier reward.path={folder}."
                )
            return folder
    raise UserError(f"{key}={run} is neither a finished run (its folder has no model/) nor the folder of a model.")
