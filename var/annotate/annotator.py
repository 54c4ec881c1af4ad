"""The annotator: numbers that do not depend on θ, computed once and read from the annotation cache afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from var.annotate.cache import AnnotationCache, CacheTable
from var.annotate.cache_column import Column, join
from var.annotate.cache_files import Keys, unique_keys
from var.annotate.cache_work import deal
from var.data.chat import Chat
from var.data.messages import prompt_content, texts_in
from var.data.rows import Rows
from var.data.settings import OnTemplateChange
from var.models.checks import list_foreign_tokens
from var.models.frozen import FrozenModel
from var.rewards.base import Reward
from var.sampling.base import Sampler
from var.sampling.local import Transformers
from var.utils.console import stage, timed
from var.utils.distributed import Ranks
from var.utils.errors import Problems, UserError
from var.utils.files import READ_ONLY, try_to_write

TOKENS = 4096  # packed tokens of one scoring pass
BLOCK = 2**21  # items that are looked for at once, which takes some 100 bytes for each
SHARD = 2048  # items per shard; an interrupted run computes at most that many again


class MissingAnnotations(UserError):
    """Annotations are not in the cache, and may not be computed: in a dry run, or with annotate=error."""

    def __init__(self, describe: Callable[[], str]) -> None:
        """Build the error. describe: returns the message, with the counts of all items that were looked for."""
        super().__init__()
        self.describe = describe

    def __str__(self) -> str:
        return self.describe()


@dataclass
class Annotator:
    """Reads numbers from the annotation cache. Computes missing ones, or raises an error with the command that does."""

    annotations: AnnotationCache
    """Where numbers are kept."""
    reference: FrozenModel
    """The model whose log-probabilities, hidden states and samples are taken."""
    reward: Reward
    """Scores responses."""
    cache: Path
    """The folder of rows and tokens."""
    sampler: Sampler = field(default_factory=Transformers)
    """Where the reference's responses come from."""
    annotate: Literal["fill", "error"] = "fill"
    """Whether missing numbers are computed or are an error."""
    command: str = "python annotate.py"
    """The shell command that fills the cache for this configuration."""
    on_template_change: OnTemplateChange = "error"
    """What to do with prompts that the chat template changes."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share the work."""
    computed: dict[str, int] = field(default_factory=dict)
    """How many items of each kind this process computed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each kind took."""
    missing: dict[str, tuple[int, int]] = field(default_factory=dict)
    """How many items of each kind were missing, and how many were asked for."""
    dry: bool = False
    """Whether this is a dry run, which computes nothing."""

    @property
    def chat(self) -> Chat:
        """The reference's chat template and tokenizer."""
        return self.reference.pretrained.chat

    @property
    def with_local_sampler(self) -> "Annotator":
        """A copy that samples from the reference itself, for answers that are compared with the policy's own."""
        return replace(self, sampler=Transformers())

    def check(self, **more: Path) -> None:
        """Raise UserError for whatever would fail later: template, model, reward, or a folder that is not writable.

        Args:
            more: other folders that will be written, by the setting that names them.
        """
        meanings = {
            "fingerprint": "says what its numbers depend on",
            "scores_text": "is True if it can score any text, and False if it only reads the data's own scores",
        }
        incomplete = Problems(f"reward: attributes are missing from {type(self.reward).__name__}; see docs/rewards.md")
        for name, meaning in meanings.items():
            if not hasattr(self.reward, name):
                incomplete.add(f"`{name}`", f"it {meaning}")
        incomplete.check()
        self.check_folders(**more)
        self.chat.end_tokens, self.reference.fingerprint, self.reward.fingerprint  # noqa: B018

    def check_folders(self, **more: Path) -> None:
        """Raise UserError for folders that are not writable. more: as for `check`.

        A cache that is read only and not empty is accepted, because it can hold everything that is needed.
        """
        problems = Problems("folders that cannot be written")
        for name, folder in {"annotation_cache": self.annotations.root, "cache": self.cache, **more}.items():
            error = try_to_write(folder)
            if error and (name in more or error.errno not in READ_ONLY or not _has_files(folder)):
                problems.add(f"{name}={folder}", str(error.strerror))
        problems.check()

    def check_rows(self, rows: Rows) -> None:
        """Raise UserError for rows with the text of a token that has no embedding in the model."""
        pretrained = self.reference.pretrained
        if not (foreign := list_foreign_tokens(self.chat.tokenizer, pretrained.config)):
            return
        problems = Problems(f"{pretrained.typed}: rows with tokens for which the model has no embedding")
        for row in rows:
            texts = list(texts_in([prompt_content(row.prompt), *([r.text, r.message] for r in row.responses)]))
            if found := [token for token in foreign if any(token in text for text in texts)]:
                problems.add(f"row {row.id}", ", ".join(f"{token!r}, id {foreign[token]}" for token in found))
        problems.check("Remove these texts, or use a model whose embeddings were resized to its tokenizer.")

    def fill(
        self,
        table: CacheTable,
        title: str,
        unit: str,
        keys: Keys,
        compute: Callable[..., Any],
        shard: int = SHARD,
        part: np.ndarray | None = None,
        cost: np.ndarray | None = None,
        first: bool = True,
    ) -> Column:
        """Return the values of `keys`, in their order, after computing the missing ones.

        BLOCK items are looked for, computed and read at a time, which bounds memory.

        Args:
            table: the table of the cache that holds them.
            title: the name of the stage, for progress and timing.
            unit: what is counted, in the plural.
            keys: [n] the items' content hashes.
            compute: called with indices into `keys` and a progress callback; returns their values.
            shard: items per file.
            part: [n] int, items with equal labels are computed by one rank, one after another, such as those that share
                a prompt.
            cost: [n] the work of each item, by which ranks are balanced, such as its tokens.
            first: False if the items continue those of the call before. They are counted together.
        """
        columns, missing = list[Column](), None
        for begin in range(0, max(len(keys), 1), BLOCK):
            some = slice(begin, begin + BLOCK)
            own = None if part is None else part[some], None if cost is None else cost[some]
            work = partial(_compute_from, begin, compute)
            try:
                columns.append(self._fill(table, title, unit, keys[some], work, shard, *own, first and begin == 0))
            except MissingAnnotations as error:  # the other blocks are counted, too
                missing = error
        if missing is not None:
            raise missing
        return join(columns)

    def _describe_missing(self, table: CacheTable, title: str, unit: str) -> str:
        missing, count = self.missing[title]
        if self.dry:
            return f"{title}: {missing} of {count} {unit} are missing in {table.path}"
        kind = table.fingerprint["kind"].replace("_", " ")
        return (
            f"annotate=error: the annotation cache lacks {missing} of {count} {kind}. Compute them once with: "
            f"{self.command}"
        )

    def _fill(
        self,
        table: CacheTable,
        title: str,
        unit: str,
        keys: Keys,
        compute: Callable[..., Any],
        shard: int,
        part: np.ndarray | None,
        cost: np.ndarray | None,
        first: bool,
    ) -> Column:
        """Fill a block; see `fill`."""
        kind = table.fingerprint["kind"]
        distinct = unique_keys(keys)[0]
        missing, count = int(table.missing(distinct).sum()), len(distinct)
        del distinct
        before = (0, 0) if first else self.missing[title]
        self.missing[title] = (before[0] + missing, before[1] + count)
        if missing and (self.dry or self.annotate == "error"):
            raise MissingAnnotations(partial(self._describe_missing, table, title, unit))
        if missing and (reason := try_to_write(self.annotations.root)):
            raise UserError(
                f"annotation_cache={self.annotations.root}: it lacks {missing} of {count} "
                f"{kind.replace('_', ' ')}, and cannot be written: {reason.strerror}. Set another folder."
            )
        self.ranks.barrier()  # also if nothing is missing: another job may be writing, and ranks may see it or not
        with self.reference.lockstep():
            if missing:
                dealt = self.ranks.rank, self.ranks.world
                own = int(table.missing(keys[deal(keys, *dealt, part, cost)]).sum())
                with timed(self.seconds, title), stage(title, own, unit) as advance:
                    done = table.fill(keys, compute, shard, *dealt, advance, part, cost)
                self.computed[title] = self.computed.get(title, 0) + done
        self.ranks.barrier()
        return table.read(keys)


def _compute_from(begin: int, compute: Callable[..., Any], indices: np.ndarray, advance: Callable[[int], None]) -> Any:
    """Return the values of items of a block that begins at `begin`."""
    return compute(indices + begin, advance)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def count_shared(prompt: np.ndarray, length: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return [n] tokens that each item adds, if items with equal prompts share its tokens: the first one adds them.

    Args:
        prompt: [n] int, the label of each item's prompt.
        length: [n] response tokens.
        tokens: [n] prompt tokens.
    """
    cost = length.copy()
    first = np.unique(prompt, return_index=True)[1]
    cost[first] += tokens[first]
    return cost


def batch_by_tokens(indices: np.ndarray, tokens: Sequence[int]) -> list[list[int]]:
    """Return batches of at most TOKENS tokens, in order, so that neighbors can share their prompt."""
    batches: list[list[int]] = []
    room = 0
    for index, size in zip(indices.tolist(), tokens, strict=True):
        if size > room or not batches:
            batches.append([])
            room = TOKENS
        batches[-1].append(index)
        room -= size
    return batches
