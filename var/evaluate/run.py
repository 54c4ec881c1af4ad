"""One evaluation: composed from eval.py's configuration, run, and written to its folder."""

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from var.annotate.annotator import Annotator
from var.annotate.cache import AnnotationCache
from var.annotate.responses import sampling_fingerprint
from var.config.check import EVAL, check
from var.config.run_files import read_run_config
from var.config.saved import find_variables, to_saved
from var.config.schema import pick_fields, to_dict
from var.data.clock import fix_today
from var.data.read import read
from var.data.rows import Rows
from var.data.sources.files import Files
from var.data.sources.local import list_files
from var.evaluate.answers import Answers, describe_answers
from var.evaluate.benchmarks.harness import Benchmarks, run_benchmarks
from var.evaluate.candidate import CachedReward, Candidate, match_answers
from var.evaluate.diversity import measure_distinct
from var.evaluate.judges.base import Judge, Pair, RewardJudge, judge_pairs
from var.evaluate.measures import average_subsets, compare, measure
from var.evaluate.prompts import Prompts, read_prompts, warn_of_trained_prompts
from var.evaluate.settings import check_settings, say_differences, warn_of_other_reference
from var.evaluate.table import print_result
from var.models.files import find_model
from var.models.frozen import FrozenModel
from var.models.pretrained import Pretrained
from var.rewards.base import Reward, check_answers
from var.rewards.dataset_score import Score
from var.sampling.base import Samples, Sampling
from var.utils.console import say, silence_libraries, warn
from var.utils.distributed import Ranks, bind_device
from var.utils.errors import UserError
from var.utils.files import atomic, make_file_name, write_json
from var.utils.provenance import collect_environment


@dataclass
class Evaluation:
    """The parts of an evaluation."""

    cfg: DictConfig
    """The configuration (conf/eval.yaml)."""
    model: Candidate
    """The model that is evaluated."""
    reference: Candidate | None
    """π_ref, which the model is compared with."""
    rewards: dict[str, Reward]
    """Those of `reward` and `second_reward` that are set."""
    judge: Judge | None
    benchmarks: Benchmarks | None
    sampling: Sampling

    @classmethod
    def compose(cls, cfg: DictConfig) -> "Evaluation":
        """Check the configuration and build the parts; no model is loaded."""
        gc.enable()  # see run_command
        silence_libraries()
        check(cfg, EVAL)
        check_settings(cfg)
        fix_today(Path(cfg.init) / "date.txt" if cfg.init else None)
        sampling = Sampling(**cfg.generate)
        model, reference = locate_models(cfg)
        if cfg.init and cfg.reference == "auto" and reference is not None:
            warn_of_other_reference(model, reference)
        rewards = {key: instantiate(cfg[key]) for key in ("reward", "second_reward") if cfg[key]}

        device = bind_device()

        def build(name: str, pretrained: Pretrained) -> Candidate:
            autocast = torch.bfloat16 if cfg.precision == "bfloat16" else None
            pretrained = pretrained.with_attention_for(device.startswith("cuda"), half=autocast is not None)
            frozen = FrozenModel(pretrained, device, autocast)
            store = AnnotationCache(Path(cfg.annotation_cache).expanduser(), warn=warn)
            cache = Path(cfg.cache).expanduser()
            reward = rewards.get("reward") or Score()  # which scores nothing
            annotator = Annotator(store, frozen, reward, cache, instantiate(cfg.sampler), ranks=Ranks.current())
            return Candidate(name, frozen, annotator)

        return cls(
            cfg, build("model", model), build("reference", reference) if reference else None, rewards,
            instantiate(cfg.judge) if cfg.judge else None, instantiate(cfg.benchmarks) if cfg.benchmarks else None,
            sampling,
        )  # fmt: skip

    @property
    def candidates(self) -> list[Candidate]:
        """The model and, if there is one, the reference."""
        return [self.model] if self.reference is None else [self.model, self.reference]

    def check(self) -> None:
        """Raise a UserError for everything that would fail later."""
        self.model.annotator.check_folders(out=Path(self.cfg.out).expanduser())
        self.prompts  # noqa: B018  errors of rows come before the models' files are read
        if self.cfg.init:
            trained = read_run_config(Path(self.model.model.pretrained.path))
            say_differences(self.cfg, trained)
            warn_of_trained_prompts(self.prompts, trained, self.model.annotator.cache)
        chats = [candidate.annotator.chat for candidate in self.candidates]
        for candidate in self.candidates:
            candidate.annotator.check()
            candidate.annotator.check_rows(self.prompts.rows)
        if any(chat.tokenizer.get_vocab() != chats[0].tokenizer.get_vocab() for chat in chats):
            raise UserError(
                "reference: its vocabulary differs from the model's, so their KL divergence is "
                "undefined. Set reference=null, or choose one with the same tokenizer."
            )
        for name, reward in self.rewards.items():
            if not reward.scores_text:
                raise UserError(
                    f"{name}=score: reads the data's scores and cannot score new text. Choose another one, or "
                    f"{name}=none if only a judge or benchmarks evaluate."
                )
            reward.fingerprint  # noqa: B018
            check_answers(reward, self.prompts.rows)
        self.file_answers  # noqa: B018
        if self.benchmarks:
            self.benchmarks.check()
        if self.judge:
            self.judge.check()
            if self.cfg.against == "reference" and self.reference is None:
                raise UserError("against=reference: there is no reference. Set reference=<folder> or against=chosen.")
            if self.cfg.against == "chosen" and not all(row.ordered for row in self.prompts.rows):
                raise UserError("against=chosen: some rows have no chosen response")

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts of all data sets."""
        return read_prompts(self.cfg, self.model.annotator.cache)

    @cached_property
    def file_answers(self) -> Samples | None:
        """The answers in the file `answers`, if it is set."""
        if self.cfg.answers is None:
            return None
        list_files(self.cfg.answers, "answers")
        file = read(Files(path=self.cfg.answers), self.model.annotator.cache)
        return match_answers(file, self.prompts.rows, len(self.cfg.seeds), self.cfg.answers)

    @property
    def name(self) -> str:
        """The name of the model, run or file that is evaluated."""
        cfg = self.cfg
        return Path(cfg.answers).name.split(".")[0] if cfg.answers else Path(cfg.init or cfg.model.name).name

    @cached_property
    def folder(self) -> Path:
        """The folder of the results, the same for the same configuration."""
        unrelated = ("annotation_cache", "cache", "devices", "out")
        kept = {key: value for key, value in to_dict(self.cfg).items() if key not in unrelated}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:8]
        name = make_file_name(f"{self.name}_{'+'.join(self.prompts.subsets)}")
        return Path(self.cfg.out).expanduser() / f"{name}-{digest}"

    def run(self) -> dict[str, Any]:
        """Sample, score and measure; write answers.jsonl, games.jsonl and result.json, and print a table.

        All ranks sample and score. The first one measures, writes and returns the result; the others return {}.
        """
        cfg, rows, labels = self.cfg, self.prompts.rows, self.prompts.labels
        self.folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {
            "title": f"{self.name} on {', '.join(self.prompts.subsets)}", "seeds": list(cfg.seeds),
        }  # fmt: skip
        answers, rewards, logps = dict[str, Answers](), dict[str, dict[str, np.ndarray]](), dict[str, np.ndarray]()
        sampled = dict[str, Samples]()
        for candidate in self.candidates:
            name = candidate.name
            if name == "model" and self.file_answers is not None:
                texts = self.file_answers
            else:
                texts = candidate.sample(rows, self.sampling, cfg.seeds)
            answers[name], sampled[name] = describe_answers(texts, candidate.annotator.chat), texts
            if self.reference and self.file_answers is None:
                logps[name] = candidate.sum_logps(rows, sampled["model"])
            if name == "model" and self.benchmarks:
                result["benchmarks"] = run_benchmarks(
                    self.benchmarks, candidate.model.policy.model, candidate.annotator.chat.tokenizer,
                    self.folder / "benchmarks", candidate.model.autocast, candidate.annotator.ranks,
                )  # fmt: skip
            candidate.model.release()
        for candidate in self.candidates:  # after all sampling: an engine of vLLM needs the memory of a reward model
            rewards[candidate.name] = {
                key: candidate.score(key, reward, rows, sampled[candidate.name]) for key, reward in self.rewards.items()
            }
        first = self.model.annotator.ranks.rank == 0
        if self.judge and (first or isinstance(self.judge, RewardJudge)):  # all ranks share the scoring of a reward
            result["win_rates"], games = self._judge(self.judge, answers)
            if first:
                self._write_lines("games.jsonl", games)
        if not first:
            return {}
        for name, found in answers.items():
            numbers = dict(rewards[name])
            if name == "model" and logps:
                numbers["kl"] = logps["model"] - logps["reference"]  # its mean estimates KL(π ‖ π_ref)
            subsets = measure(labels, found.texts, found.finished, found.lengths, numbers)
            result[name] = {"subsets": subsets, "averages": average_subsets(subsets, self._averages)}
        if self.reference:
            sizes = answers["model"].lengths, answers["reference"].lengths
            result["against_reference"] = {
                key: compare(labels, rewards["model"][key] - rewards["reference"][key], *sizes) for key in self.rewards
            }
        result["distinct"] = measure_distinct({name: found.texts for name, found in answers.items()})
        result["depends_on"] = self._provenance()
        self._write_lines("answers.jsonl", self._records(sampled, rewards))
        write_json(self.folder / "result.json", result)
        print_result(result, cfg.against)
        say(f"Result: {self.folder}/result.json")
        return result

    @property
    def _averages(self) -> dict[str, list[str]]:
        """The averages in the configuration, and one over the subsets of each data set."""
        sets = self.prompts.subsets
        own = {"all" if len(sets) == 1 else f"all of {name}": subsets for name, subsets in sets.items()}
        return {**to_dict(self.cfg.averages), **own}

    def _judge(self, judge: Judge, answers: dict[str, Answers]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return win rates against the reference's answers or the chosen responses, and one record per game."""
        rows, seeds = self.prompts.rows, list(self.cfg.seeds)
        if self.cfg.against == "chosen":
            opponents = [[row.responses[0].as_text] * len(seeds) for row in rows]
        else:
            opponents = answers["reference"].texts
        if isinstance(judge, RewardJudge):
            judge = replace(judge, reward=CachedReward(self.model.annotator, judge.reward))
        pairs = make_pairs(rows, self.prompts.labels, seeds, answers["model"].texts, opponents, self.cfg.judged)
        return judge_pairs(judge, pairs)

    def _provenance(self) -> dict[str, Any]:
        """Return everything that the numbers depend on."""
        sampled = [c for c in self.candidates if not (c.name == "model" and self.cfg.answers)]
        sources: dict[str, Any] = {c.name: sampling_fingerprint(c.annotator, self.sampling) for c in sampled}
        if self.cfg.answers:
            content = b"".join(path.read_bytes() for path in list_files(self.cfg.answers, "answers"))
            sources["model"] = {"file": self.cfg.answers, "sha256": hashlib.sha256(content).hexdigest()}
        return {
            "weights": {c.name: c.model.fingerprint for c in sampled},
            "origins": {
                **{c.name: c.model.pretrained.origin for c in sampled},
                **{name: getattr(reward, "origin", None) for name, reward in self.rewards.items()},
            },
            "answers": sources,
            "rewards": {name: reward.fingerprint for name, reward in self.rewards.items()},
            "prompts": hashlib.sha256(self.prompts.rows.keys.tobytes()).hexdigest()[:16],
            "config": to_saved(self.cfg),
            **collect_environment(),
        }

    def _records(self, sampled: dict[str, Samples], rewards: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        """Return one record per prompt, with all answers, their tokens and rewards."""
        return [
            {
                "id": row.id, "subset": str(self.prompts.labels[i]), "prompt": list(row.prompt), "answer": row.answer,
                **{
                    name: [
                        {
                            **sample.record,
                            **{key: float(scores[i, s]) for key, scores in rewards[name].items()},
                        }
                        for s, sample in enumerate(samples[i])
                    ]
                    for name, samples in sampled.items()
                },
            }
            for i, row in enumerate(self.prompts.rows)
        ]  # fmt: skip

    def _write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        with atomic(self.folder / name, errors="replace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def locate_models(cfg: DictConfig) -> tuple[Pretrained, Pretrained | None]:
    """Return the model to evaluate, and the reference, if there is one."""
    base = Pretrained(**pick_fields(Pretrained, cfg.model), cache=cfg.cache)
    model, reference = base, None
    if cfg.init:
        path = find_model(cfg.init)
        trained = read_run_config(path)
        reference = base = use_prompts_of(trained["model"], base)
        model = base.at(str(path), chat_template=None)
        if cfg.reference == "auto" and (parent := trained.get("init")):
            if find_variables(parent, "init"):
                raise UserError(
                    f"reference=auto: {path}/config.yaml does not name the initial model of this run, which came from "
                    f"the environment (init: {parent}). Set reference to its folder, or to null."
                )
            reference = model.at(str(find_model(parent)))
    if cfg.reference is None:
        return model, None
    if cfg.reference != "auto":
        reference = model.at(str(find_model(cfg.reference, "reference")))
    return model, reference


def use_prompts_of(trained: Mapping[str, Any], model: Pretrained) -> Pretrained:
    """Return a model that reads prompts with the date and the template arguments of a run, unless it has its own.

    trained: the run's settings of its model.
    """
    kwargs = {**(trained.get("chat_template_kwargs") or {}), **(model.chat_template_kwargs or {})}
    if unknown := find_variables(kwargs, "model.chat_template_kwargs"):
        raise UserError(f"{unknown[0]}: its value in training came from the environment, and was not saved. Set it.")
    return replace(model, date=model.date or trained.get("date"), chat_template_kwargs=kwargs)


def make_pairs(
    rows: Rows,
    labels: np.ndarray,
    seeds: Sequence[int],
    texts: list[list[str]],
    opponents: list[list[str]],
    limit: int | None,
) -> list[Pair]:
    """Return the pairs to judge: every seed's answer to the first `limit` prompts of each subset."""
    pairs, seen = [], dict.fromkeys(labels.tolist(), 0)
    for row, label, own, other in zip(rows, labels.tolist(), texts, opponents, strict=True):
        seen[label] += 1
        if limit is None or seen[label] <= limit:
            pairs += [
                Pair(row.id, label, seed, row.prompt, answer, opponent, row.answer)
                for seed, answer, opponent in zip(seeds, own, other, strict=True)
            ]
    return pairs
