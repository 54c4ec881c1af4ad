"""Sample and reward a model's responses to the data's prompts: `python sample.py init=runs/… out=rows.jsonl`."""

import var.config.installed  # isort: skip  # noqa: F401  before what may be missing

import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from var.config.check import FOLDER, TRAIN, check
from var.config.entry import run_command
from var.utils.distributed import Ranks, process_group, set_rank_variables


def check_target(out: Path, cfg: DictConfig) -> None:
    """Raise UserError if the file is the data, or exists and is not of this command."""
    from var.utils.errors import UserError

    if not out.exists():
        return
    target, data = out.resolve(), Path(cfg.data.get("path") or "").expanduser().resolve()
    if cfg.data.get("path") and (target == data or data in target.parents):
        raise UserError(f"out={out} is the data that is read. Choose another file.")
    with out.open(errors="replace") as file:
        first = file.readline()
    try:
        own = not first or "sampling" in json.loads(first)
    except (ValueError, TypeError):
        own = False
    if not own:
        raise UserError(f"out={out} exists, and sample.py did not write it. Choose another file, or remove it.")


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="sample")
def main(cfg: DictConfig) -> None:
    """Write K responses to every prompt, validation prompts included; the same data.seed selects these again."""
    set_rank_variables()

    from omegaconf import OmegaConf, open_dict

    from var.utils.errors import UserError

    if OmegaConf.is_missing(cfg, "out"):
        raise UserError("out: a file must be given: out=rows.jsonl")
    out = Path(cfg.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder. Name a file in it: out={out / 'rows.jsonl'}.")
    check_target(out, cfg)
    with open_dict(cfg):
        del cfg.out
    check(cfg, TRAIN, imports=False)

    from var.training.run import Run

    run = Run.compose(cfg, Path("."), trains=False, own_folder=False)
    with process_group(run.settings.timeout):
        sample(run, out)


def sample(run: Any, out: Path) -> None:
    """Sample and score on all ranks of the launcher. The first one writes the file."""
    from var.annotate.responses import sample_responses, sampling_fingerprint
    from var.annotate.rewards import score_candidates
    from var.data.read import read
    from var.data.split import draw
    from var.rewards.base import check_answers
    from var.utils.console import is_first_rank, say
    from var.utils.files import atomic

    cfg, annotator, generate = run.cfg, run.annotator, run.data.training_set.sampling
    annotator.check_folders(out=out.parent)
    rows = read(run.data.source, annotator.cache)
    if rows.description:
        say(f"Data: {rows.description}")
    rows = draw(rows, run.data.settings)
    check_answers(annotator.reward, rows)
    annotator.check()
    annotator.check_rows(rows)
    annotator.ranks = Ranks.current()
    samples = sample_responses(annotator, rows, generate)
    scores = score_candidates(annotator, rows, generate) if annotator.reward.scores_text else None
    if not is_first_rank():
        return
    sampling = sampling_fingerprint(annotator, generate)
    written = empty = without_response = 0
    with atomic(out) as file:
        for i, (row, several) in enumerate(zip(rows, samples, strict=True)):
            responses = [
                {**sample.record, "source": cfg.init or cfg.model.path}
                | ({} if scores is None else {"score": float(scores[i, k])})
                for k, sample in enumerate(several)
            ]
            kept = [response for response in responses if response["text"].strip()]
            empty += len(responses) - len(kept)
            written += len(kept)
            without_response += not kept
            record = {
                "id": row.id, "prompt": row.prompt, "responses": kept, "answer": row.answer, "subset": row.subset,
                "sampling": sampling, "tools": row.prompt.tools or None,
                "chat_template_kwargs": row.prompt.template_kwargs or None,
            }  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    say(f"{written} responses to {len(rows) - without_response} prompts in {out}; empty responses skipped: {empty}")
    if without_response:
        say(f"{without_response} prompts have no response; their rows are written without responses")


def command() -> None:
    """Run the command line."""
    run_command(main)


if __name__ == "__main__":
    command()
