"""From eval.py's configuration to an evaluation, and what it leaves behind."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.table import Table

from var.annotate.annotator import Annotator
from var.annotate.cache import AnnotationCache
from var.config.check import EVAL, check
from var.config.schema import pick_fields, to_dict
from var.data.rows import Rows, concatenate, read
from var.data.settings import DataSettings
from var.data.sources.files import Files
from var.data.sources.local import listed
from var.data.split import split
from var.evaluate import diversity
from var.evaluate import measures as evaluation
from var.evaluate.judges.base import RewardJudge
from var.models.frozen import FrozenModel
from var.models.pretrained import Pretrained, find_model
from var.rewards.base import check_answers
from var.sampling.base import Sampling
from var.training import summary
from var.training.run import silence_libraries
from var.utils.console import console, say, warn
from var.utils.errors import Problems, UserError
from var.utils.files import atomic
from var.utils.provenance import environment


@dataclass
class Evaluation:
    """The parts of one evaluation."""

    cfg: DictConfig
    policy: Annotator
    reference: Annotator | None
    rewards: dict[str, Any]
    judge: Any
    benchmarks: Any
    sampling: Sampling

    @classmethod
    def compose(cls, cfg: DictConfig) -> "Evaluation":
        """Check the configuration as a whole, then build what is light: no model is loaded."""
        silence_libraries()
        check(cfg, EVAL)
        check_values(cfg)
        names = [part.name for part in (cfg.data, *cfg.more.values())]
        if len(set(names)) < len(names):
            raise UserError(f"data sets must have different names, got {names}: set more.….name")
        if isinstance(cfg.held_out, ListConfig) and (unknown := set(cfg.held_out) - set(names)):
            raise UserError(f"held_out names {sorted(unknown)}, and the data sets are {names}")
        if cfg.answers and cfg.init:
            raise UserError("answers= is a file in place of a model's answers, so init= would do nothing beside it")
        if cfg.answers and cfg.benchmarks:
            raise UserError("benchmarks run a model, and answers= is a file: leave one away")
        if not cfg.seeds or len(set(cfg.seeds)) < len(cfg.seeds):
            raise UserError(f"seeds are one or several different numbers, got {list(cfg.seeds)}")
        sampling = Sampling(**cfg.generate)
        if sampling.responses != 1:
            raise UserError("eval.py samples one answer a prompt and seed: leave generate.responses at 1, set seeds")
        if sampling.temperature == 0 and len(cfg.seeds) > 1 and not cfg.answers:
            raise UserError("at temperature 0 all seeds are one: set seeds=[0]")
        pretrained = Pretrained(**pick_fields(Pretrained, cfg.model), cache=cfg.cache)
        start = pretrained if cfg.init else None
        if cfg.init:
            folder = find_model(cfg.init)
            trained = folder / "config.yaml"
            if (
                cfg.reference == "auto"
                and trained.exists()
                and (before := OmegaConf.select(OmegaConf.load(trained), "init"))
            ):
                start = replace(pretrained, path=str(find_model(before)), revision=None, chat_template=None)
            pretrained = replace(pretrained, path=str(folder), revision=None, chat_template=None)
        if cfg.reference is None:
            start = None
        elif cfg.reference != "auto":
            start = replace(pretrained, path=str(find_model(cfg.reference, "reference")), revision=None)
        reward = instantiate(cfg.reward)

        def annotator(model: Pretrained) -> Annotator:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = torch.bfloat16 if cfg.precision == "bfloat16" else None
            store = AnnotationCache(Path(cfg.annotation_cache).expanduser(), warn=warn)
            cache = Path(cfg.cache).expanduser()
            return Annotator(store, FrozenModel(model, device, dtype), reward, cache, instantiate(cfg.sampler))

        rewards = {"reward": reward}
        if cfg.second_reward:
            rewards["second_reward"] = instantiate(cfg.second_reward)
        return cls(
            cfg, annotator(pretrained), annotator(start) if start else None, rewards,
            instantiate(cfg.judge) if cfg.judge else None, instantiate(cfg.benchmarks) if cfg.benchmarks else None,
            sampling,
        )  # fmt: skip

    def check(self) -> None:
        """What would fail later is told now."""
        for annotator in filter(None, (self.policy, self.reference)):
            annotator.check()
        if self.reference and self.reference.chat.tokenizer.get_vocab() != self.policy.chat.tokenizer.get_vocab():
            raise UserError("model and reference have different vocabularies, so a KL between them means nothing")
        for name, reward in self.rewards.items():
            if not reward.scores_text:
                raise UserError(f"{name}=score reads the data's own scores and cannot score new text; choose another")
            reward.identity  # noqa: B018
            check_answers(reward, self.rows)
        self.given  # noqa: B018
        if self.benchmarks:
            self.benchmarks.check()
        if self.judge:
            self.judge.check()
            if self.cfg.against == "reference" and self.reference is None:
                raise UserError(
                    "the judge sets the answers against the reference's, and there is none: set reference=<folder>, "
                    "or against=chosen"
                )
            if self.cfg.against == "chosen" and not all(row.ordered for row in self.rows):
                raise UserError("against=chosen, and these rows have no chosen response")

    @cached_property
    def sets(self) -> dict[str, Rows]:
        """Of each data set its prompts, one row each."""
        cfg, sets = self.cfg, {}
        for part in (cfg.data, *cfg.more.values()):
            settings = DataSettings(**pick_fields(DataSettings, part))
            rows = read(instantiate(part.source), self.policy.cache).head(settings.limit)
            held_out = part.name in cfg.held_out if isinstance(cfg.held_out, ListConfig) else cfg.held_out
            if held_out:
                rows = split(rows, settings)[0]
            chosen = evaluation.draw(rows, evaluation.subsets(rows, part.name), cfg.prompts, cfg.seed)
            say(
                f"{part.name}: {len(chosen)} of {len(np.unique(rows.keys))} "
                + ("held-out prompts; held_out=false takes all" if held_out else "prompts, held-out ones or not")
            )
            sets[part.name] = rows.select(chosen)
        return sets

    @cached_property
    def rows(self) -> Rows:
        """The prompts of all data sets, one after the other."""
        rows = concatenate(list(self.sets.values()))
        problems = Problems("data sets share", shown=5)
        if len(self.sets) > 1:
            labels = [set(evaluation.subsets(part, name)) for name, part in self.sets.items()]
            ids = [set(part.table["id"]) for part in self.sets.values()]
            for what, several in (("a subset", labels), ("a row's id", ids)):
                for name, times in Counter(one for part in several for one in part).items():
                    if times > 1:
                        problems.add(what, str(name))
        problems.check("Results are told apart by them: evaluate the sets one by one.")
        return rows

    @cached_property
    def labels(self) -> np.ndarray:
        """[P] the subset of each row."""
        return np.concatenate([evaluation.subsets(part, name) for name, part in self.sets.items()])

    @property
    def name(self) -> str:
        """Of what is evaluated."""
        cfg = self.cfg
        return Path(cfg.answers).name.split(".")[0] if cfg.answers else Path(cfg.init or cfg.model.name).name

    @cached_property
    def folder(self) -> Path:
        content = {k: v for k, v in to_dict(self.cfg).items() if k not in ("store", "cache", "out")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return Path(self.cfg.out).expanduser() / f"{self.name}_{'+'.join(self.sets)}-{digest}"

    @cached_property
    def given(self) -> evaluation.Texts | None:
        """The answers of the file, where there is one."""
        if self.cfg.answers is None:
            return None
        listed(self.cfg.answers, "answers")
        file = read(Files(path=self.cfg.answers), self.policy.cache)
        return evaluation.given(file, self.rows, len(self.cfg.seeds), self.cfg.answers)

    @property
    def _averages(self) -> dict[str, list[str]]:
        """Those that the configuration names, and of each data set that of its subsets."""
        whole = {
            "all" if len(self.sets) == 1 else f"all of {name}": np.unique(evaluation.subsets(rows, name)).tolist()
            for name, rows in self.sets.items()
        }
        return {**to_dict(self.cfg.averages), **whole}

    def run(self) -> dict[str, Any]:
        """Sample, score, measure, write."""
        cfg, rows, labels, seeds = self.cfg, self.rows, self.labels, list(self.cfg.seeds)
        self.folder.mkdir(parents=True, exist_ok=True)
        sides = {"model": self.policy, "reference": self.reference}
        result: dict[str, Any] = {"title": f"{self.name} on {', '.join(self.sets)}", "seeds": seeds}
        texts, encoded, sizes, rewards, logps = {}, {}, {}, {}, {}
        for side, annotator in sides.items():
            if annotator is None:
                continue
            if side == "model" and self.given is not None:
                texts[side] = self.given
            else:
                texts[side] = evaluation.answers(annotator, rows, self.sampling, seeds, f"Answers of the {side}")
            encoded[side] = evaluation.tokens(annotator, rows, texts[side])
            sizes[side] = encoded[side].size.reshape(len(rows), -1)
            if self.reference and self.given is None:  # both read the policy's answers, while they are loaded
                logps[side] = evaluation.logps(annotator, encoded["model"]).reshape(len(rows), -1)
            if side == "model" and self.benchmarks:
                result["benchmarks"] = self._benchmarks()
            annotator.reference.release()
            rewards[side] = {
                name: evaluation.scores(annotator, reward, rows, texts[side], f"{name} of the {side}")
                for name, reward in self.rewards.items()
            }
        for side in texts:
            numbers = dict(rewards[side])
            if side == "model" and logps:
                numbers["kl"] = logps["model"] - logps["reference"]  # its mean estimates KL(π ‖ π_ref)
            measured = evaluation.measure(labels, texts[side], sizes[side], numbers)
            result[side] = {"subsets": measured, "averages": evaluation.averages(measured, self._averages)}
        if "reference" in texts:
            result["against_reference"] = {
                name: evaluation.compare(
                    labels, rewards["model"][name] - rewards["reference"][name], sizes["model"], sizes["reference"]
                )
                for name in self.rewards
            }
        plain = {side: [[text for text, _ in several] for several in found] for side, found in texts.items()}
        result["distinct"] = diversity.distinct(plain)
        if self.judge:
            own = [[(row.responses[0].text, True)] * len(seeds) for row in rows] if cfg.against == "chosen" else None
            opponents = own or texts["reference"]
            judge = self.judge
            if isinstance(judge, RewardJudge):
                judge = replace(judge, reward=evaluation.Stored(self.policy, judge.reward))
            result["win_rates"], games = evaluation.judged(
                judge, rows, labels, texts["model"], opponents, cfg.judged, seeds
            )
            self._lines("games.jsonl", games)
        models = {side: one for side, one in sides.items() if one and not (side == "model" and cfg.answers)}
        result["depends_on"] = {
            "weights": {side: annotator.reference.identity for side, annotator in models.items()},
            "answers": {side: annotator.source(self.sampling) for side, annotator in models.items()} | self._file(),
            "rewards": {name: reward.identity for name, reward in self.rewards.items()},
            "prompts": hashlib.sha256(rows.keys.tobytes()).hexdigest()[:16],
            "config": to_dict(cfg),
            **environment(),
        }
        self._lines("answers.jsonl", self._records(labels, texts, rewards))
        summary.write(self.folder, result, "result.json")
        self.show(result)
        return result

    def _benchmarks(self) -> dict[str, Any]:
        from var.evaluate.benchmarks import harness as benchmarks

        model, tokenizer = self.policy.reference.policy.model, self.policy.chat.tokenizer
        return benchmarks.run(self.benchmarks, model, tokenizer, self.folder / "benchmarks")

    def _file(self) -> dict[str, Any]:
        if self.cfg.answers is None:
            return {}
        content = b"".join(path.read_bytes() for path in listed(self.cfg.answers, "answers"))
        return {"model": {"file": self.cfg.answers, "sha256": hashlib.sha256(content).hexdigest()}}

    def _records(self, labels: np.ndarray, texts: Any, rewards: Any) -> list[dict[str, Any]]:
        return [
            {
                "id": row.id, "subset": str(labels[i]), "prompt": list(row.prompt), "answer": row.answer,
                **{
                    side: [
                        {"text": t, "finished": f, **{name: float(v[i, s]) for name, v in rewards[side].items()}}
                        for s, (t, f) in enumerate(found[i])
                    ]
                    for side, found in texts.items()
                },
            }
            for i, row in enumerate(self.rows)
        ]  # fmt: skip

    def _lines(self, name: str, records: list[dict[str, Any]]) -> None:
        with atomic(self.folder / name, errors="replace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def show(self, result: dict[str, Any]) -> None:
        """The closing table: mean ± standard error by prompt."""
        table = Table(title=result["title"], title_justify="left")
        table.add_column("")
        for side in ("reference", "model"):
            table.add_column(side, justify="right")
        measured = result["model"]["subsets"]
        for name, part in measured.items():
            before = result.get("reference", {}).get("subsets", {}).get(name, {})
            for key in ("reward", "second_reward", "kl", "length"):
                if key in part:
                    table.add_row(f"{name}: {key}", cell(before.get(key)), cell(part[key]))
            table.add_row(f"{name}: share cut", f"{before['cut']:.2f}" if before else "–", f"{part['cut']:.2f}")
        for name, part in result["model"]["averages"].items():
            before = result.get("reference", {}).get("averages", {}).get(name, {})
            of = len(part["of"])
            if of + len(part["without"]) == 1:
                continue
            count = f"{of} of {of + len(part['without'])} subsets" if part["without"] else f"{of} subsets"
            table.add_row(f"average, {name} ({count}): reward", cell(before.get("reward")), cell(part["reward"]))
        if "win_rates" in result:
            table.add_row(f"win rate in %, against {self.cfg.against}", "", cell(result["win_rates"]["all"]))
            if "lc_win_rate" in (facts := result["win_rates"]["facts"]):
                rate = {"mean": facts["lc_win_rate"], "se": facts.get("lc_se")}
                table.add_row("length-controlled win rate in %", "", cell(rate))
        console.print(table)
        for score in result.get("benchmarks", {}).get("scores", []):
            say(" ".join(f"{key}={value}" for key, value in score.items() if not isinstance(value, list | dict)))
        console.print(f"Result: {self.folder}/result.json", markup=False)


def check_values(cfg: DictConfig) -> None:
    """Values of the right type that mean nothing."""
    problems = Problems("the configuration cannot be used")
    for name in ("prompts", "judged"):
        if cfg[name] is not None and cfg[name] < 1:
            problems.add(name, f"must be at least 1, or null for all, got {cfg[name]}")
    if cfg.seed < 0:
        problems.add("seed", f"must be at least 0, got {cfg.seed}")
    if cfg.generate.seed != cfg.seed:
        problems.add("generate.seed", "nothing reads it here: seeds has the seeds of sampling")
    for name in ("init", "answers", "reference"):
        if cfg[name] == "":
            problems.add(name, f"is empty, as after {name}=$RUN of an unset variable; null is none")
    if not isinstance(cfg.more, DictConfig) or not all(isinstance(part, DictConfig) for part in cfg.more.values()):
        problems.add("more", f"further data sets by name, as +data@more.bias=offsetbias, got {cfg.more!r}")
    averages = cfg.averages.values() if isinstance(cfg.averages, DictConfig) else [cfg.averages]
    if not all(isinstance(of, ListConfig) for of in averages):
        problems.add("averages", f"lists of subsets by name, got {cfg.averages}")
    problems.check()


def cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    mean = value.get("mean", value.get("win_rate"))
    error = value.get("se_prompts", value.get("se"))
    return "–" if mean is None else f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")
