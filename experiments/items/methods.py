"""The methods that the project's own comparisons run, and how they are tuned."""

from collections.abc import Iterable

from experiments.items.base import Command, Row, train

PAIRS = ("data.micro_batch=4", "data.global_batch=4")
GROUPS = ("data.micro_batch=2", "data.global_batch=2")  # of 4 answers, so that a step has 8, as those of other losses
SPREADS = (0.1, 0.3, 1.0, 3.0)  # λ in standard deviations of the reward within a prompt
UNITS = (0.03, 0.1, 0.3, 1.0)  # λ in units of the reward, one standard deviation of which is about 0.3
RIGHT = ("loss=var_global", "loss.temperature_unit=reward", "loss.temperature=0.001", "loss.min_weight=0.5")
RATE, DEFAULT_RATE = "model.learning_rate", 2e-5

METHODS: dict[str, tuple[tuple[str, ...], str, tuple[float, ...]]] = {
    "SFT on the best of 4": (("loss=sft", "data.responses=best"), "", ()),
    "SFT on right answers": (RIGHT, "", ()),
    "VAR, the paper's": (("loss=var",), "loss.temperature", SPREADS),
    "VAR, prompt": (("loss=var_prompt",), "loss.temperature", SPREADS),
    "VAR, grouped": (("loss=var_grouped",), "loss.temperature", SPREADS),
    "VAR, grouped, roulette": (
        ("loss=var_grouped", "loss.min_weight=1", "loss.roulette=true"), "loss.temperature", SPREADS,
    ),
    "VAR, global, roulette": (
        ("loss=var_global", "loss.min_weight=1", "loss.roulette=true"), "loss.temperature", SPREADS,
    ),
    "DPO": (("loss=dpo", *PAIRS), "loss.beta", (0.03, 0.1, 0.3, 1.0)),
    "InfoNCA": (("loss=infonca", *GROUPS, "loss.beta=1"), "loss.temperature", UNITS),
    "A-LoL": (("loss=alol", "loss.value.development_prompts=32"), "", ()),
    "DRO-V": (("loss=dro", "loss.initial_value=0.3"), "loss.temperature", UNITS),
    "trajectory balance, reverse KL": (("loss=trajectory_balance", *GROUPS), "loss.temperature", UNITS),
    "trajectory balance, forward KL": (
        ("loss=trajectory_balance", *GROUPS, "loss.alpha=0"), "loss.temperature", UNITS,
    ),
    "RLOO": (("loss=rloo", *GROUPS), "", ()),
    "GRPO": (("loss=grpo", *GROUPS), "", ()),
    "VAR, online": (("loss=var_online", *GROUPS), "loss.temperature", UNITS),
}  # fmt: skip
"""Overrides, and λ or β with its values if the method has one that is tuned."""
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
TUNED: dict[str, float] = {
    "VAR, the paper's": 0.3, "VAR, prompt": 0.1, "VAR, grouped": 0.1, "VAR, grouped, roulette": 1.0,
    "VAR, global, roulette": 0.3, "DPO": 0.3, "InfoNCA": 0.03, "DRO-V": 0.03, "trajectory balance, reverse KL": 0.1,
    "trajectory balance, forward KL": 0.1, "VAR, online": 0.03,
}  # fmt: skip
"""λ or β of each method that has one: the value with the highest reward within 2 nats, at the default learning rate."""
RATES: dict[str, float] = {
    "SFT on the best of 4": 4e-5, "SFT on right answers": 1e-5, "VAR, the paper's": 2e-5, "VAR, prompt": 1e-5,
    "VAR, grouped": 2e-5, "VAR, grouped, roulette": 2e-5, "VAR, global, roulette": 2e-5, "DPO": 2e-5, "InfoNCA": 1e-5,
    "A-LoL": 1e-5, "DRO-V": 2e-5, "trajectory balance, reverse KL": 2e-5, "trajectory balance, forward KL": 2e-5,
    "RLOO": 2e-5, "GRPO": 1e-5, "VAR, online": 1e-5,
}  # fmt: skip
"""The learning rate of each method with the highest reward within 2 nats, at the tuned λ or β."""


def list_rates(method: str) -> tuple[float, ...]:
    """Return the learning rates that are tried. Methods with λ or β have run with the default rate before."""
    return (1e-5, 4e-5) if METHODS[method][1] else (1e-5, 2e-5, 4e-5)


def tune(method: str, rate: float | None = None) -> tuple[str, ...]:
    """Return the overrides of a method with its tuned λ or β, and a learning rate; None for the tuned one."""
    words, key, _ = METHODS[method]
    rate = RATES[method] if rate is None else rate
    own = (f"{key}={TUNED[method]:g}",) if key else ()
    return (*words, *own, *(() if key and rate == DEFAULT_RATE else (f"{RATE}={rate:g}",)))


def make_run(experiment: str, words: Iterable[str], *more: str) -> dict[str, Command]:
    """Return the training run of a method."""
    return {"train": train(experiment, *words, *more)}


def make_rows(experiment: str, *words: str, methods: Iterable[str] = METHODS) -> tuple[Row, ...]:
    """Return a row per method with its tuned values."""
    chosen = [method for method in methods if method in RATES]
    return tuple(Row(label=method, stages=make_run(experiment, tune(method), *words)) for method in chosen)
