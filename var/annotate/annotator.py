"""What fills the store: samples, rewards, reference log-probabilities, prompt features; only what is missing."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from var.annotate.cache import AnnotationCache, CacheTable, Keys, as_keys
from var.annotate.value_head import ValueHead
from var.data import rows as rows_module
from var.data.chat import Chat
from var.data.rows import Response, Row, Rows
from var.data.sequences import Sequences
from var.models.frozen import FrozenModel
from var.models.packing import pack, pack_tree, whole
from var.rewards.base import Reward, Triple, Triples, check_scores, compute_scores
from var.rewards.scale import Scale
from var.sampling.base import Sampler, Sampling
from var.sampling.local import Transformers
from var.utils.console import stage, timed
from var.utils.distributed import Ranks
from var.utils.errors import Problems, UserError
from var.utils.provenance import hash_content

TOKENS = 4096  # packed tokens of one scoring pass


SHARD = 2048  # items of one shard; a killed run computes at most so many again


@dataclass
class Annotator:
    """Brings numbers from the store; computes and stores what is missing, or refuses with the command that does.

    annotate: `fill` or `refuse`. command: the shell line that fills the store for this very configuration.
    sampler: where the reference's responses come from.
    computed, seconds: how many items of each kind this process computed, and how long that took.
    """

    store: AnnotationCache
    reference: FrozenModel
    reward: Reward
    cache: Path
    sampler: Sampler = field(default_factory=Transformers)
    annotate: Literal["fill", "error"] = "fill"
    command: str = "python annotate.py"
    ranks: Ranks = field(default_factory=Ranks)
    computed: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, tuple[int, int]] = field(default_factory=dict)
    dry: bool = False

    @property
    def chat(self) -> Chat:
        return self.reference.pretrained.chat

    @property
    def here(self) -> "Annotator":
        """The same with the reference itself as sampler: for what is set beside answers that the policy draws so."""
        return replace(self, sampler=Transformers())

    def check(self, **more: Path) -> None:
        """Touch everything that sampling and scoring will need, before the first of them costs anything. more: other
        folders that will be written, by the setting that names them."""
        self.chat.suffix, self.chat.end_token, self.reference.identity, self.reward.identity  # noqa: B018
        problems = Problems("folders that cannot be written")
        for name, folder in {"store": self.store.root, "cache": self.cache, **more}.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                problems.add(f"{name}={folder}", str(error.strerror))
        problems.check()

    def _bring(
        self, shelf: CacheTable, title: str, unit: str, keys: Keys, compute: Callable[..., Any], shard: int = SHARD
    ) -> pa.Array:
        """The values of `keys` in their order, after what is missing of them has been computed."""
        kind = shelf.identity["kind"]
        distinct = np.unique(keys)
        missing = int(shelf.missing(distinct).sum())
        self.missing[title] = (missing, len(distinct))
        if missing and self.dry:
            raise Unfilled(f"{title}: {missing} of {len(distinct)} {unit} are missing in {shelf.path}")
        if missing and self.annotate == "error":
            raise UserError(
                f"the store lacks {missing} of {len(distinct)} {kind.replace('_', ' ')} and annotate=error. Write "
                f"them once, every later run reads them: {self.command}"
            )
        self.ranks.barrier()  # with nothing missing too: another job may be writing, and ranks see it or not
        if missing:
            with timed(self.seconds, title), stage(title, -(-missing // self.ranks.world), unit) as advance:
                done = shelf.fill(keys, compute, shard, self.ranks.rank, self.ranks.world, advance)
            self.computed[title] = self.computed.get(title, 0) + done
        self.ranks.barrier()
        return shelf.read(keys)

    def source(self, sampling: Sampling) -> dict[str, Any]:
        """What the text of sampled responses depends on, beside their prompts."""
        return {**self.sampler.identity(self.reference), "sampling": sampling.identity}

    def sampled(self, rows: Rows, sampling: Sampling, title: str = "Sampling") -> list[list[tuple[str, bool]]]:
        """K (text, finished) for each row's prompt, from the reference."""
        one = pa.struct([("text", pa.string()), ("finished", pa.bool_())])
        shelf = self.store.shelf("responses", self.source(sampling), pa.list_(one))

        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[list[dict[str, Any]]]:
            self.sampler.check()  # here: what is stored needs no sampler, on this machine or at all
            prompts = [rows[i].prompt for i in indices]
            texts = self.sampler(self.reference, prompts, sampling, advance)
            return [[{"text": t, "finished": f} for t, f in several] for several in texts]

        values = self._bring(shelf, title, "prompts", rows.keys, compute, shard=256).to_pylist()
        self.sampler.release()
        return [[(one["text"], one["finished"]) for one in several] for several in values]

    def score(self, triples: Sequence[Triple], title: str = "Scoring") -> np.ndarray:
        """[n] raw rewards of (prompt, response, answer), any pairing of them."""
        shelf = self.store.shelf("rewards", {"reward": self.reward.identity}, pa.float64())
        keys = as_keys([hash_content(*triple) for triple in triples])

        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
            out: list[float] = []
            for begin in range(0, len(indices), 64):
                prompts, texts, answers = zip(*(triples[i] for i in indices[begin : begin + 64]), strict=True)
                out.extend(compute_scores(self.reward, prompts, texts, answers).tolist())
                advance(len(texts))
            if bad := [i for i, value in zip(indices, out, strict=True) if not np.isfinite(value)]:
                problems = Problems("rewards that are not finite")
                for i in bad:
                    problems.add(f"response {triples[i][1][:60]!r}", "the reward is NaN or infinite")
                problems.check()
            return out

        return self._bring(shelf, title, "responses", keys, compute).to_numpy()

    def row_rewards(self, rows: Rows) -> list[np.ndarray]:
        """Raw rewards of all responses of each row."""
        if not self.reward.scores_text:
            check_scores(row.id for row in rows if any(response.score is None for response in row.responses))
            return [np.array([response.score for response in row.responses]) for row in rows]
        sizes = np.array([len(row.responses) for row in rows])
        index = np.repeat(np.arange(len(rows)), sizes)
        response = np.concatenate([np.arange(size) for size in sizes])
        flat = self.score(Triples(rows, index, index, response))
        return np.split(flat, np.cumsum(sizes)[:-1])

    def reference_logps(self, sequences: Sequences, share: bool = False) -> pa.Array:
        """[n] lists of float32: log π_ref of each response token, in nats. share: pack as the step will, see `pack`."""
        identity = self.reference.identity
        if share and self.reference.rounds:
            identity["packing"] = "shared prompts"
        shelf = self.store.shelf("reference_logps", identity, pa.list_(pa.float32()))
        keys = as_keys(
            [_token_key(ids[:start], ids[start:]) for ids, start, _ in map(sequences.tokens, range(len(sequences)))]
        )

        @torch.inference_mode()
        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[list[float]]:
            out: dict[int, list[float]] = {}
            for batch in _budget(indices, (sequences.start + sequences.length)[indices].tolist()):
                ids, starts, _ = zip(*(sequences.tokens(i) for i in batch), strict=True)
                packed = pack(ids, starts, share=share)
                with self.reference.precision():
                    logps = self.reference.policy(packed.to(self.reference.device)).float().cpu()
                out.update(zip(batch, (part.tolist() for part in logps.split(packed.length.tolist())), strict=True))
                advance(len(batch))
            return [out[i] for i in indices]

        return self._bring(shelf, "Reference log-probabilities", "responses", keys, compute)

    def cross_logps(self, sequences: Sequences, micro: np.ndarray) -> np.ndarray:
        """[M, B, B] nats: log π_ref(y_j|x_i), summed over tokens, of each micro-batch; 0 where it is short."""
        pairs, place = _pairs(micro)
        return _matrix(self._pair_logps(sequences, pairs), micro, place)

    def mismatched_logps(self, sequences: Sequences, micro: np.ndarray) -> torch.Tensor:
        """[M, W] nats: the reference's log-probability of the next response of a micro-batch under each prompt."""
        following = np.full_like(micro, -1)
        for m, members in enumerate(micro):
            members = members[members >= 0]
            following[m, : len(members)] = np.roll(members, -1)
        place = micro >= 0  # absent members stand last
        out = torch.zeros(micro.shape, dtype=torch.float64)
        pairs = np.stack([micro[place], following[place]], axis=1)
        out[torch.from_numpy(place)] = torch.from_numpy(self._pair_logps(sequences, pairs).copy())
        return out

    def _pair_logps(self, sequences: Sequences, pairs: np.ndarray) -> np.ndarray:
        """[P] nats: the reference's summed log-probability of response j under the prompt of i, for pairs [P, 2]."""
        shelf = self.store.shelf("cross_logps", self.reference.identity, pa.float64())
        tokens = {int(i): sequences.tokens(i)[:2] for i in np.unique(pairs)}
        keys = as_keys(
            [_token_key(tokens[i][0][: tokens[i][1]], tokens[j][0][tokens[j][1] :]) for i, j in pairs.tolist()]
        )

        @torch.inference_mode()
        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
            out: dict[int, float] = {}
            opens = np.diff(pairs[indices, 0], prepend=-1) != 0  # a pair that brings its prompt's tokens too
            cost = [
                len(tokens[j][0]) - tokens[j][1] + tokens[i][1] * int(new)
                for (i, j), new in zip(pairs[indices].tolist(), opens, strict=True)
            ]
            for batch in _budget(indices, cost):
                prompts: dict[int, list[int]] = {}
                for at in batch:
                    prompts.setdefault(int(pairs[at, 0]), []).append(at)
                order = [at for several in prompts.values() for at in several]
                tree = pack_tree(
                    [tokens[i][0][: tokens[i][1]] for i in prompts],
                    [
                        [tokens[j][0][tokens[j][1] :] for j in pairs[several, 1].tolist()]
                        for several in prompts.values()
                    ],
                )
                with self.reference.precision():
                    logps = self.reference.policy(tree.to(self.reference.device)).double().cpu()
                out.update(zip(order, tree.sum_by_sequence(logps).tolist(), strict=True))
                advance(len(batch))
            return [out[i] for i in indices]

        return self._bring(shelf, "Cross log-probabilities", "pairs", keys, compute).to_numpy()

    def cross_rewards(self, rows: Rows, sequences: Sequences, micro: np.ndarray) -> np.ndarray:
        """[M, B, B] raw rewards r(x_i, y_j) of each micro-batch; 0 where it is short."""
        pairs, place = _pairs(micro)
        if not self.reward.scores_text:
            gap = getattr(self.reward, "mismatch_gap", None)
            if gap is None:
                raise UserError(
                    "an in-batch estimator needs the reward of every response under every prompt of its micro-batch, "
                    "and reward=score has only the own pairs. Choose a reward that scores text, an estimator that "
                    "needs own rewards (loss=var_prompt), or state what a mismatched response loses: "
                    "reward.mismatch_gap=<reward units>"
                )
            own = sequences.column("score")
            same = sequences.group[pairs[:, 0]] == sequences.group[pairs[:, 1]]
            return _matrix(own[pairs[:, 1]] - np.where(same, 0.0, gap), micro, place)
        rows_of, response_of = sequences.row, np.array(sequences.table["response"])
        triples = Triples(rows, rows_of[pairs[:, 0]], rows_of[pairs[:, 1]], response_of[pairs[:, 1]])
        return _matrix(self.score(triples, "Cross scoring"), micro, place)

    def candidates(self, rows: Rows, sampling: Sampling) -> np.ndarray:
        """[R, K] raw rewards of K sampled responses to each row's prompt, the empty ones too."""
        if not self.reward.scores_text:
            raise UserError(
                "this loss rewards responses that the reference samples, and reward=score reads only the data's own; "
                "choose a reward that scores text"
            )
        texts = self.sampled(rows, sampling, "Sampling candidates")
        triples = [
            (row.prompt, text, row.answer) for row, several in zip(rows, texts, strict=True) for text, _ in several
        ]
        return self.score(triples, "Scoring candidates").reshape(len(rows), sampling.responses)

    def values(
        self, head: ValueHead, development: Rows, sequences: Sequences, sampling: Sampling, scale: Scale
    ) -> np.ndarray:
        """[G] V(x): the reference's expected reward of each group's prompt, by a head on its hidden states.

        The head is fitted on the rewards of the reference's own answers to `development`, prompts that do not train.
        """
        rewards = torch.from_numpy(scale(self.candidates(development, sampling)).mean(1)).float()
        identity = {
            **self.source(sampling), "reference": self.reference.identity, "reward": self.reward.identity,
            "scale": scale.describe(), "head": asdict(head),
            "development": [bytes(key).hex() for key in development.keys],
        }  # fmt: skip
        prompts = [ids[:start] for ids, start, _ in map(sequences.tokens, sequences.first.tolist())]
        fitted: list[torch.nn.Module] = []

        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[float]:
            if not fitted:
                states = self._states([self.chat.prompt(row.prompt) for row in development])
                fitted.append(head.fit(states, rewards))
            out: list[float] = []
            for begin in range(0, len(indices), 64):
                some = indices[begin : begin + 64]
                out.extend(head.predict(fitted[0], self._states([prompts[i] for i in some])).tolist())
                advance(len(some))
            return out

        shelf = self.store.shelf("values", identity, pa.float32())
        keys = as_keys([_token_key(prompt, ()) for prompt in prompts])
        return self._bring(shelf, "Values", "prompts", keys, compute).to_numpy()

    @torch.inference_mode()
    def _states(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """[T, H] each, float32 on the CPU: the reference's last hidden states of prompts."""
        out: dict[int, torch.Tensor] = {}
        for batch in _budget(np.arange(len(prompts)), list(map(len, prompts))):
            packed = whole([prompts[i] for i in batch]).to(self.reference.device)
            with self.reference.precision():
                states = self.reference.policy.prompt_states(packed)
            out.update(zip(batch, (part.float().cpu() for part in states), strict=True))
        return [out[i].clone() for i in range(len(prompts))]

    def features(self, sequences: Sequences) -> np.ndarray:
        """[G, 2H] float32: the reference's last and mean hidden state of each group's prompt."""
        prompts = [ids[:start] for ids, start, _ in map(sequences.tokens, sequences.first.tolist())]
        shelf = self.store.shelf("features", self.reference.identity, pa.list_(pa.float32()))
        keys = as_keys([_token_key(prompt, ()) for prompt in prompts])

        @torch.inference_mode()
        def compute(indices: np.ndarray, advance: Callable[[int], None]) -> list[np.ndarray]:
            out: dict[int, np.ndarray] = {}
            for batch in _budget(indices, [len(prompts[i]) for i in indices]):
                packed = whole([prompts[i] for i in batch]).to(self.reference.device)
                with self.reference.precision():
                    states = self.reference.policy.prompt_features(packed)
                out.update(zip(batch, states.float().cpu().numpy(), strict=True))
                advance(len(batch))
            return [out[i] for i in indices]

        values = self._bring(shelf, "Prompt features", "prompts", keys, compute)
        return np.stack(values.to_numpy(zero_copy_only=False))


class Unfilled(Exception):
    """A dry run met a shelf that it would have to fill."""


def add_responses(rows: Rows, texts: list[list[tuple[str, bool]]], cache: Path) -> tuple[Rows, dict[str, int]]:
    """Prompts and their sampled responses as rows; empty responses are left out and counted, as are the cut ones."""
    counts = {"sampled responses": 0, "sampled responses left out as empty": 0, "sampled responses cut": 0}

    filled = list[Row]()
    for row, several in zip(rows, texts, strict=True):
        responses = [Response(text=t, finished=f, source="sampled") for t, f in several if t.strip()]
        counts["sampled responses"] += len(several)
        counts["sampled responses left out as empty"] += len(several) - len(responses)
        counts["sampled responses cut"] += sum(not r.finished for r in responses)
        filled.append(replace(row, responses=tuple(responses), ordered=False))
    target = cache / "rows" / hash_content(rows.table._fingerprint, texts).hex()
    if not (target / "done.json").exists():
        rows_module.write(filled, target, Problems("sampled rows"))
        rows_module.finish(target, {"left_out": 0})
    return rows_module.load(target), counts


def _token_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    return hash_content(list(prompt), list(response))


def _budget(indices: np.ndarray, cost: Sequence[int]) -> list[list[int]]:
    """Batches of at most TOKENS tokens, in order, so that neighbours can share their prompt."""
    batches: list[list[int]] = []
    room = 0
    for index, tokens in zip(indices.tolist(), cost, strict=True):
        if tokens > room or not batches:
            batches.append([])
            room = TOKENS
        batches[-1].append(index)
        room -= tokens
    return batches


def _pairs(micro: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) of each micro-batch, [P, 2], and where they stand in [M, B, B] (bool)."""
    left, right = np.broadcast_arrays(micro[:, :, None], micro[:, None, :])
    place = (left >= 0) & (right >= 0)
    return np.stack([left[place], right[place]], axis=1), place


def _matrix(values: np.ndarray, micro: np.ndarray, place: np.ndarray) -> np.ndarray:
    out = np.zeros((*micro.shape, micro.shape[1]))
    out[place] = values
    return out
