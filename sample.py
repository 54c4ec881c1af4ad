"""A model's answers to the data's prompts, rewarded, as rows: `python sample.py init=runs/… out=rows.jsonl`."""

import hydra
from omegaconf import DictConfig

from var.config.check import FOLDER, TRAIN, check
from var.config.entry import run_command


@hydra.main(version_base="1.3", config_path=FOLDER, config_name="sample")
def main(cfg: DictConfig) -> None:
    """K responses to every prompt, held-out ones too (the same seed holds them out again), from the reference."""
    import json
    from pathlib import Path

    from omegaconf import OmegaConf, open_dict

    from var.utils.errors import UserError

    if OmegaConf.is_missing(cfg, "out"):
        raise UserError("out must be given: out=rows.jsonl")
    out = Path(cfg.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name a file in it: out={out / 'rows.jsonl'}")
    with open_dict(cfg):
        del cfg.out
    check(cfg, TRAIN, imports=False)

    from var.data.rows import read
    from var.rewards.base import check_answers
    from var.training.run import Run
    from var.utils.console import say
    from var.utils.files import atomic

    run = Run.compose(cfg, Path("."))
    run.annotator.check(out=out.parent)
    rows = read(run.data.source, run.annotator.cache).head(run.data.settings.limit)
    check_answers(run.annotator.reward, rows)
    texts = run.annotator.sampled(rows, run.data.sampling)
    scores = run.annotator.candidates(rows, run.data.sampling) if run.annotator.reward.scores_text else None
    sampling = run.annotator.source(run.data.sampling)
    written = empty = unanswered = 0
    with atomic(out) as file:
        for i, (row, several) in enumerate(zip(rows, texts, strict=True)):
            responses = [
                {"text": text, "finished": finished, "source": cfg.init or cfg.model.path}
                | ({} if scores is None else {"score": float(scores[i, k])})
                for k, (text, finished) in enumerate(several)
            ]
            kept = [response for response in responses if response["text"].strip()]
            empty += len(responses) - len(kept)
            written += len(kept)
            unanswered += not kept
            record = {
                "id": row.id, "prompt": row.prompt, "responses": kept, "answer": row.answer, "subset": row.subset,
                "sampling": sampling,
            }  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    say(f"{written} responses to {len(rows) - unanswered} prompts in {out}; left out, as empty: {empty}")
    if unanswered:
        say(f"{unanswered} prompts have no answer left; their rows stand there without")


if __name__ == "__main__":
    run_command(main)
