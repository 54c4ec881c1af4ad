"""The methods that the project's own comparisons run, and the hyper-parameter of each that is tuned."""

from collections.abc import Iterable

from experiments.items.base import Command, Row, train

PAIRS = ("data.micro_batch=4", "data.global_batch=4")
GROUPS = ("data.micro_batch=2", "data.global_batch=2")  # of 4 answers, so that a step has 8, as those of other losses
RATE, RATES = "model.learning_rate", (1e-5, 2e-5, 4e-5, 8e-5)
SPREADS = (0.1, 0.3, 1.0, 3.0)  # λ in standard deviations of the reward within a prompt
UNITS = (0.03, 0.1, 0.3, 1.0)  # λ in units of the reward, one standard deviation of which is about 0.3
RIGHT = ("loss=var_global", "loss.temperature_unit=reward", "loss.temperature=0.001", "loss.min_weight=0.5")

METHODS: dict[str, tuple[tuple[str, ...], str, tuple[float, ...]]] = {
    "SFT on the best of 4": (("loss=sft", "data.responses=best"), RATE, RATES),
    "SFT on right answers": (RIGHT, RATE, RATES),
    "VAR, the paper's": (("loss=var",), "loss.temperature", SPREADS),
    "VAR, prompt": (("loss=var_prompt",), "loss.temperature", SPREADS),
    "VAR, grouped": (("loss=var_grouped",), "loss.temperature", SPREADS),
    "DPO": (("loss=dpo", *PAIRS), "loss.beta", (0.03, 0.1, 0.3, 1.0)),
    "InfoNCA": (("loss=infonca", *GROUPS, "loss.beta=1"), "loss.temperature", UNITS),
    "A-LoL": (("loss=alol", "loss.value.development_prompts=32"), RATE, RATES),
    "DRO-V": (("loss=dro", "loss.initial_value=0.3"), "loss.temperature", UNITS),
    "trajectory balance, reverse KL": (("loss=trajectory_balance", *GROUPS), "loss.temperature", UNITS),
    "trajectory balance, forward KL": (
        ("loss=trajectory_balance", *GROUPS, "loss.alpha=0"), "loss.temperature", UNITS,
    ),
    "RLOO": (("loss=rloo", *GROUPS), RATE, RATES),
    "GRPO": (("loss=grpo", *GROUPS), RATE, RATES),
    "VAR, online": (("loss=var_online", *GROUPS), "loss.temperature", UNITS),
}  # fmt: skip
"""Overrides, the hyper-parameter that is tuned, and its values."""
OTHERS: dict[str, tuple[str, ...]] = {
    "VAR, Eq. 10 as printed": ("loss=var_literal",),
    "VAR, summed log-probabilities": ("loss=var_sum",),
    "VAR, own pairs": ("loss=var_own",),
    "VAR, sampled Z": ("loss=var_sampled",),
    "VAR, value": ("loss=var_value",),
    "VAR, global": ("loss=var_global",),
    "IPO": ("loss=ipo", *PAIRS),
    "SimPO": ("loss=simpo", *PAIRS),
    "EXO": ("loss=exo", *PAIRS),
    "KTO": ("loss=kto", "loss.threshold=0.5"),
    "NCA": ("loss=nca", *GROUPS, "loss.beta=1", "loss.temperature=0.3"),
    "DFT on the best of 4": ("loss=dft", "data.responses=best"),
    "ASFT on the best of 4": ("loss=asft", "data.responses=best"),
    "iw-SFT on the best of 4": ("loss=iw_sft", "data.responses=best"),
    "VAR, online, with a baseline": ("loss=var_online", *GROUPS, "loss.baseline=true", "loss.temperature=0.3"),
    "DAPO": ("loss=dapo", *GROUPS),
}
"""Overrides of methods that are not tuned."""
TUNED: dict[str, float] = {}
"""The value of each method with the highest reward within 2 nats in the table of hyper-parameters."""


def make_run(experiment: str, method: str, value: float, *words: str) -> dict[str, Command]:
    """Return the training run of a method with a value of its hyper-parameter."""
    own, key, _ = METHODS[method]
    return {"train": train(experiment, *own, f"{key}={value:g}", *words)}


def make_rows(experiment: str, *words: str, methods: Iterable[str] = METHODS) -> tuple[Row, ...]:
    """Return a row per method with its tuned value."""
    chosen = [method for method in methods if method in TUNED]
    return tuple(Row(label=m, stages=make_run(experiment, m, TUNED[m], *words)) for m in chosen)
