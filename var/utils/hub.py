"""The Hugging Face hub: explain why a model or data set could not be read, and read licenses from cards."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from var.utils.errors import UnavailableError, brief
from var.utils.plain_yaml import check_aliases

TOKEN = "HF_TOKEN=… or `hf auth login`"


def explain_failure(error: Exception, typed: str, repo: str, advice: str, kind: str = "model") -> UnavailableError:
    """Return the error that says why a download failed and what to do.

    Args:
        error: What the hub's client raised.
        typed: What the message starts with: the setting and its value, such as `model.path=owner/name`.
        repo: The repository, owner/name.
        advice: What helps without the hub, such as "set model.path to a folder".
        kind: `model`, `dataset` or `space`, as the hub calls it.
    """
    from huggingface_hub import constants, errors, get_token

    causes = list(_list_causes(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    status = next((c.response.status_code for c in causes if isinstance(c, errors.HfHubHTTPError)), None)
    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repo}"
    if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        what = (
            f"the disk is full. Free space for {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk. "
            "The same command keeps the files that are complete."
        )
    elif caused_by(errors.GatedRepoError):
        account = "The account of the token that is set has no access to it" if get_token() else "No token is set"
        what = f"{repo} is gated. {account}. Accept its license at {page}, and set a token of that account: {TOKEN}."
    elif caused_by(errors.RevisionNotFoundError):
        what = f"{repo} has no such revision. Check its branches, tags and commits at {page}/commits/main."
    elif caused_by(errors.HFValidationError):
        what = f"this is neither a folder nor the name of a {kind} on the hub (owner/name). Check the name."
    elif caused_by(errors.RepositoryNotFoundError) or (status == 401 and not get_token()):
        what = (
            f"the hub has no {kind} {repo} that you can read. Check the name at {page}, with its capitals. If it is "
            f"private, set a token: {TOKEN}."
        )
    elif status in (401, 403):
        what = f"the hub rejected the token (status {status}). Set a valid one ({TOKEN}), or unset HF_TOKEN."
    elif constants.is_offline_mode() or caused_by(errors.OfflineModeIsEnabled):
        option = "" if kind == "model" else f" --repo-type {kind}"
        what = (
            f"not completely on this machine (searched: {constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids "
            f"downloads. Unset it, or run `hf download {repo}{option}` where there is a network, or {advice}."
        )
    elif status == 404:
        what = f"{repo} lacks a file that is needed ({brief(error)}). Check the files at {page}/tree/main, or {advice}."
    else:
        what = (
            f"not on this machine, and it could not be downloaded from {constants.ENDPOINT} "
            f"({type(error).__name__}: {brief(error)}). Check the network and HF_ENDPOINT; the same command keeps the "
            f"files that are complete. Or {advice}."
        )
    return UnavailableError(f"{typed}: {what}")


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def read_license(folder: str) -> str | None:
    """Return the license that the card of a model or data set in a folder states; None if it states none."""
    try:
        _, front, _ = (Path(folder) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        facts: dict[str, Any] = yaml.safe_load(check_aliases(front))
        named = facts.get("license_name") if facts.get("license") == "other" else None
        return named or facts.get("license")
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):  # no card, or not in the hub's form
        return None


def download_license(repo: str, revision: str | None, kind: str = "model") -> str | None:
    """Return the license that a repository's card states; None if it states none or cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    try:
        return read_license(str(Path(hf_hub_download(repo, "README.md", revision=revision, repo_type=kind)).parent))
    except Exception:  # the hub's client raises many types, and a license is never needed
        return None
