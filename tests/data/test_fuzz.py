"""Random inputs: each is read unchanged, or is an error that names its position."""

import gzip
import hashlib
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from notebooks.tiny import TEMPLATE, byte_tokenizer
from tests.helpers.cache import keys, open_table
from var.data.chat import Chat
from var.data.parse import KEYS, parse_row
from var.data.read import read
from var.data.rows import Rows
from var.data.sources.files import Files
from var.data.sources.preferences import Preferences
from var.data.sources.prompts import Prompts
from var.utils.errors import UserError

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")


def fuzz(examples: int) -> Any:
    """Return settings that generate the same examples in every run."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # shrinking would take minutes
    return hypothesis.settings(derandomize=True, max_examples=examples, deadline=None, database=None, phases=phases)


TEXT = st.text(st.characters(codec=None), max_size=8)  # with unpaired surrogates, NUL and line ends
NUMBER = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 1e400, 2**63, 2**64, -0.0, math.nan])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
WORDS = st.text("ab ?é", min_size=1, max_size=6)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": WORDS | JSON}
)
PROMPT = WORDS | st.lists(MESSAGE, max_size=3) | JSON
RESPONSE = WORDS | st.fixed_dictionaries(
    {"text": WORDS | TEXT},
    optional={"score": NUMBER | JSON, "weight": NUMBER, "source": WORDS | JSON, "finished": st.booleans() | JSON},
)


def mix(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw from `usual` five times out of six."""
    return st.integers(0, 5).flatmap(lambda draw: usual if draw else odd)


RECORD = st.fixed_dictionaries(
    {"prompt": mix(WORDS, PROMPT), "responses": mix(st.lists(RESPONSE, max_size=3), JSON)},
    optional={
        "id": TEXT | JSON, "ordered": mix(st.booleans(), JSON), "answer": TEXT | JSON, "subset": TEXT | JSON,
        "sampling": JSON, "chosen": JSON, "strange": JSON,
    },
)  # fmt: skip
LINE = st.one_of(
    RECORD.map(lambda value: json.dumps(value).encode()),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20),
    st.integers(900, 5000).map(lambda depth: b"[" * depth + b"]" * depth),
    st.integers(4000, 5000).map(lambda digits: b'{"prompt": "a", "responses": [], "id": ' + b"9" * digits + b"}"),
)


def try_read(source: Any, folder: Path) -> Rows | str:
    """Return the rows, or the message of a UserError. Any other exception fails the test."""
    try:
        return read(source, folder / "cache")
    except UserError as error:
        return str(error)


@fuzz(150)
@hypothesis.given(lines=st.lists(mix(RECORD.map(lambda value: json.dumps(value).encode()), LINE), max_size=3))
def test_lines_become_rows_or_are_named(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        file.write_bytes(b"\n".join(lines))
        given = [(number, line) for number, line in enumerate(file.read_bytes().split(b"\n"), start=1) if line.strip()]
        found = try_read(Files(path=str(file)), Path(name))
        if isinstance(found, str):
            names = [f"rows.jsonl:{number}" for number, _ in given]
            places = (*names, "rows.jsonl:row 1", "rows.jsonl: not a JSON array")  # this one names line and column
            assert not given or any(f"{place}: " in found for place in places), found
            return
        assert len(found) == len(given)
        for row, (number, line) in zip(found, given, strict=True):
            value = json.loads(line.decode("utf-8-sig"))
            value = value[0] if isinstance(value, list) else value
            value = {key: part for key, part in value.items() if key in KEYS}
            assert row == parse_row(value if value.get("id") is not None else {**value, "id": f"rows.jsonl:{number}"})
            for response in row.responses:
                for score in (response.score, response.weight):
                    assert score is None or math.isfinite(score)


@fuzz(100)
@hypothesis.given(value=RECORD | JSON, kind=st.sampled_from([Prompts, Preferences]))
def test_other_adapters_name_invalid_lines(value: Any, kind: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        file.write_text(json.dumps(value))
        found = try_read(kind(path=str(file)), Path(name))
        assert not isinstance(found, str) or re.search(r"rows.jsonl:(row )?\d+: |it has no rows", found)


@fuzz(60)
@hypothesis.given(data=st.binary(max_size=40), cut=st.integers(0, 60))
def test_gzip_file_is_complete_or_named(data: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl.gz"
        packed = gzip.compress(data)
        file.write_bytes(packed[: len(packed) - cut] if cut < len(packed) else data)
        found = try_read(Files(path=str(file)), Path(name))
        assert isinstance(found, str)
        assert "rows.jsonl.gz" in found or "it has no rows" in found


COLUMN = st.sampled_from(
    [
        pa.array(["a", "b"]), pa.array(["a", None]), pa.array([1, 2]), pa.array([1.5, math.nan]), pa.nulls(2),
        pa.array([True, None]), pa.array([b"a", b"\xff"]), pa.array([["a"], ["b", "c"]]), pa.array([[], None]),
        pa.array([[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]),
        pa.array([[{"text": "a", "score": 1}], [{"text": "b", "score": None}]]), pa.array([{"text": "a"}, None]),
        pa.array([[b"a"], [None]]), pa.array(["a", "a"]).dictionary_encode(), pa.array(["a", "b"], pa.large_string()),
        pa.array([0, 2**62], pa.timestamp("ms")), pa.array([1, 2], pa.date32()), pa.array([1, 2], pa.decimal128(5)),
        pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())), pa.array([1, 2], pa.duration("ns")),
        pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers()),
    ]
)  # fmt: skip
NAMES = st.lists(
    st.sampled_from(["id", "prompt", "responses", "ordered", "answer", "score", "prompt "]), min_size=1, max_size=4
)


@fuzz(100)
@hypothesis.given(data=st.data())
def test_parquet_of_any_schema_becomes_rows_or_is_named(data: st.DataObject) -> None:
    names = data.draw(NAMES)
    table = pa.table([data.draw(COLUMN) for _ in names], names=names)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.parquet"
        pq.write_table(table, file)
        found = try_read(Files(path=str(file)), Path(name))
        if isinstance(found, str):
            assert "rows.parquet" in found, found
        else:
            assert len(found) == 2


@fuzz(100)
@hypothesis.given(data=st.data())
def test_damaged_parquet_file_is_named(data: st.DataObject) -> None:
    rows = {"id": ["a", "b"] * 20, "prompt": ["what?"] * 40, "responses": [["x", "y"]] * 40}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({**rows, "id": [f"r{i}" for i in range(40)]}), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.parquet"
        file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
        found = try_read(Files(path=str(file)), Path(name))
        assert not isinstance(found, str) or "rows.parquet" in found or "it has no rows" in found


PIECE = st.sampled_from(
    [
        "{{ bos_token }}", "{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ m.content | trim }}",
        "{{ m['role'] }}", "<end>", "{{ '<end>' }}", "{% if add_generation_prompt %}", "{% endif %}", "<assistant>",
        "{{ messages[9].content }}", "{{ messages[0]['content'] }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}",
        "{{ x }}", "{{ x.y }}", "{{ m.content + 1 }}", "{% set x = 5 %}", "{{", "}}", "{%", "%}", "{#", "probe",
        "{{ ''.__class__.__mro__ }}", "{{ range(10 ** 9) | list }}", "{{ messages }}", "{% else %}", "a", "\n", " ",
        "{{ messages.append(1) }}", "{{ 'a' * 3 }}", "{{ tools | length }}", "{% break %}", "{{ m | nofilter }}",
    ]
)  # fmt: skip
PIECES = st.lists(PIECE, max_size=8).map("".join) | st.tuples(PIECE, PIECE).map(
    lambda both: TEMPLATE.replace("{% endfor %}", both[0] + "{% endfor %}" + both[1])
)
CHATS = byte_tokenizer()


@fuzz(200)
@hypothesis.given(template=PIECES, response=WORDS | TEXT)
def test_chat_template_works_or_is_a_clear_error(template: str, response: str) -> None:
    """An invalid template is a UserError, an invalid row a ValueError."""
    try:
        chat = Chat(CHATS, template)
        _ = chat.suffix, chat.end_token
    except UserError as error:
        message = str(error)
        assert "template" in message
        return
    try:
        encoded = chat.encode([{"role": "user", "content": "a"}], response)
    except ValueError:
        return
    assert 0 < encoded.start < len(encoded.ids)
    assert encoded.ids[-1] == chat.end_token


def make_shard() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        target = open_table(Path(name))
        target.write(keys(1, 2, 3), [1.0, 4.0, 9.0])
        return next(target.path.glob("*.arrow")).read_bytes()


SHARD = make_shard()


@fuzz(80)
@hypothesis.given(data=st.data(), named=st.booleans())
def test_shard_of_any_bytes_is_read_or_reported(data: st.DataObject, named: bool) -> None:
    """named: the file name is the checksum of its bytes, so that only their form can be wrong."""
    content = bytearray(SHARD)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else bytes(content)
    if data.draw(st.integers(0, 4)) == 0:
        content = data.draw(st.binary(max_size=30))
    with tempfile.TemporaryDirectory() as name:
        reports: list[str] = []
        target = open_table(Path(name), warn=reports.append)
        target.path.mkdir(parents=True)
        stem = hashlib.sha256(content if named else SHARD).hexdigest()[:32]
        (target.path / f"{stem}.arrow").write_bytes(content)
        missing = target.missing(keys(1, 2, 3))
        assert len(reports) == (len(target) == 0)
        if not named:
            assert missing.all() == (content != SHARD)
        if missing.any():
            seen = target.fill(keys(1, 2, 3), lambda indices, advance: [float((i + 1) ** 2) for i in indices], 2)
            assert seen == missing.sum()
        if not named or content == SHARD:
            assert target.read(keys(1, 2, 3)).to_pylist() == [1.0, 4.0, 9.0]
