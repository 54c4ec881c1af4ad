"""Parse records in the form of rows. Every invalid value is an error that names its key."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from var.data.messages import parse_prompt, split_answer
from var.data.row import Response, Row
from var.data.rows import FEATURES, RESPONSE

NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
FLAGS = {"true": True, "false": False}
KEYS = (*FEATURES, "tools", "chat_template_kwargs")  # of a record


def parse_row(record: Any) -> Row:
    """Return the row in a record of a file. Raise a ValueError for unknown keys and wrong types."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a row must be an object with id, prompt and responses, got {type(record).__name__}")
    if unknown := set(record) - set(KEYS):
        raise ValueError(f"unknown keys {sorted(unknown)}; a row has {sorted(KEYS)}")
    id = record.get("id")
    if isinstance(id, float) and id.is_integer():  # Parquet files of pandas, if other rows have no id
        id = int(id)
    if type(id) not in (str, int):
        raise ValueError(f"'id' must be text or an integer, got {id!r}")
    sampling = record.get("sampling")
    return Row(
        id=str(id),
        prompt=parse_prompt(record.get("prompt"), record.get("tools"), record.get("chat_template_kwargs")),
        responses=tuple(map(_parse_response, _get(record, "responses", list | tuple, "a list") or ())),
        ordered=bool(_get_flag(record, "ordered")),
        answer=_get_text(record, "answer"),
        subset=_get_text(record, "subset"),
        sampling=sampling if isinstance(sampling, str | None) else json.dumps(sampling, ensure_ascii=False),
    )


def _parse_response(value: Any) -> Response:
    if isinstance(value, str):
        return Response(text=value)
    if isinstance(value, Mapping) and "role" in value:
        own = {key: value[key] for key in ("score", "weight", "source", "finished", "ids") if key in value}
        _, text, message = split_answer([{k: v for k, v in value.items() if k not in own}], "responses")
        value = {**own, "text": text, "message": message}
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise ValueError(f"a response must be text or an object with 'text', got {value!r}")
    message = _get(value, "message", Mapping, "an object") or {}
    if {"role", "content"} & set(message):
        raise ValueError("'message' has the further keys of a response, not its role or its content, which is 'text'")
    ids = _get(value, "ids", list | tuple, "a list of token ids")
    if ids is not None and not (ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)):
        raise ValueError(f"'ids' must be a list of token ids, got {ids!r}")
    if unknown := set(value) - set(RESPONSE):
        raise ValueError(f"unknown keys {sorted(unknown)} in a response; it has {sorted(RESPONSE)}")
    return Response(
        text=value["text"], source=_get(value, "source", str, "text"), message=message,
        score=get_number(value, "score"), weight=get_number(value, "weight"),
        finished=_get_flag(value, "finished") is not False, ids=None if ids is None else tuple(ids),
    )  # fmt: skip


def get_number(record: Mapping[str, Any], key: str) -> float | None:
    """Return a number, also one that is written as text, as all values of a CSV file are."""
    value = record.get(key)
    if isinstance(value, str) and NUMERAL.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"'{key}' must be a number, got {value!r}")
    return None if value is None else float(value)


def _get_flag(record: Mapping[str, Any], key: str) -> bool | None:
    value = record.get(key)
    value = FLAGS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool | None):
        raise ValueError(f"'{key}' must be true or false, got {value!r}")
    return value


def _get(record: Mapping[str, Any], key: str, kind: Any, expected: str) -> Any:
    """Return the value of a key, or None if it is missing. Raise a ValueError if it has another type."""
    value = record.get(key)
    if not isinstance(value, kind | None):
        raise ValueError(f"'{key}' must be {expected}, got {value!r}")
    return value


def _get_text(record: Mapping[str, Any], key: str) -> str | None:
    """Return a text, or a number as text. NaN often marks a missing number, so it is an error, not the text `nan`."""
    value = record.get(key)
    if isinstance(value, Mapping | list | tuple | bytes) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"'{key}' must be text, a finite number or null, got {value!r}")
    return None if value is None else str(value)
