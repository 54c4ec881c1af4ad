"""The runs at the small size that several items share: SmolLM2-135M on arithmetic with a graded reward, 20 steps."""

from dataclasses import replace

from experiments.items.base import Column, Row, summary, train

WORDS = ("experiment=frontier", "trainer.max_seconds=null", "trainer.max_steps=20")
SEEDS = (0, 1, 2)
PAIRS = ("data.micro_batch=4", "data.global_batch=4")  # so that a step has 8 sequences, as those of other losses
RUNS = {
    "SFT": ("loss=sft", "data.responses=best"),
    "DPO": ("loss=dpo", *PAIRS),
    "VAR": ("loss=var",),
    "SFT+DPO": ("loss=dpo", *PAIRS, "init={SFT}"),
    "SFT+VAR": ("loss=var", "init={SFT}"),
    "A-LoL": ("loss=alol", "loss.value.development_prompts=10"),
    "A-LoL, KL form": ("loss=alol_kl", "loss.value.development_prompts=10"),
    "R-LoL": ("loss=rlol",),
    "VAR, prompt": ("loss=var_prompt",),
    "B = 2": ("loss=var", "data.micro_batch=2"),
    "B = 4": ("loss=var", "data.micro_batch=4"),
    "B = 8": ("loss=var",),
    "8∗: 8 sampled candidates": ("loss=var_sampled",),
    "SFT on all answers": ("loss=sft",),
    "mean over tokens": ("loss=var",),
    "sum over tokens": ("loss=var_sum",),
    "mean over tokens, of the rows' own pairs": ("loss=var_own",),
    "sum over tokens, not in the numerator: as printed": ("loss=var_literal",),
}
ROWS = {label: Row(label=label, stages={"train": train(*WORDS, *words)}) for label, words in RUNS.items()}
GAINS = (
    Column(title="reward before training", read=summary("validation.reward.before")),
    Column(title="reward after training", read=summary("validation.reward.after")),
    Column(title="gain", read=summary("validation.reward.gain")),
    Column(title="KL from the initial policy (nats)", read=summary("validation.kl"), digits=2),
)
ESS = Column(title="effective sample size / n of the weights", read=summary("ess"), digits=2)


def pick(*labels: str) -> tuple[Row, ...]:
    """Return the rows with these labels, and hidden after them the others, which they may continue."""
    return (*(ROWS[label] for label in labels), *(replace(r, shown=False) for k, r in ROWS.items() if k not in labels))
