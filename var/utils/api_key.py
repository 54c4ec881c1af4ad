"""API keys and addresses: checked before use, and keys removed from text that a server or a library wrote."""

import os
import re
from urllib.parse import urlsplit

from var.utils.errors import UserError

ALLOWED = re.compile(r"[!#-&(-\[\]-~]+")  # printable ASCII without quotes and backslashes, which JSON would escape
SHORTEST_SECRET = 8  # characters; shorter keys are placeholders such as "EMPTY", which also occur in ordinary text


def read_key(name: str) -> str:
    """Return the key in the environment variable `name`.

    Raise a UserError if it is not set, or if it has a character that no key has, such as the line break at the end of a
    file. The messages name the variable and never show the key.
    """
    if not (key := os.environ.get(name, "")):
        raise UserError(f"{name} is not set in the environment")
    if not ALLOWED.fullmatch(key):
        found = next(i for i, character in enumerate(key) if not ALLOWED.fullmatch(character))
        raise UserError(
            f"{name} in the environment is not an API key: its character {found + 1} of {len(key)} is a space, a line "
            f"break, a quote, a backslash or not ASCII. If it comes from a file, remove line breaks: export {name}="
            "$(tr -d '\\r\\n' < FILE)"
        )
    return key


def redact(text: str, key: str | None) -> str:
    """Return `text` with the key replaced by "[API key]". Encoded forms of the key, such as base64, are not found."""
    return text if key is None or len(key) < SHORTEST_SECRET else text.replace(key, "[API key]")


def check_address(key: str, url: str) -> None:
    """Raise a UserError, which names `key`, if `url` is not a plain address. Secrets in it would be saved and shown."""
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{key}: {error}. Expected an address such as http://127.0.0.1:8000/v1") from None
    if address.username is not None or address.password is not None or address.query or address.fragment:
        raise UserError(
            f"{key}: an address may not have a user name, a password, a query or a fragment, because it is saved in "
            "the files of a run. Put the key into an environment variable, and its name into api_key_env"
        )
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"{key}: expected an address with http:// or https://, got {url}")
