"""The tables and figures of arXiv 2502.11026, as data: rows, columns, and the commands that fill them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of each row."""

    title: str
    path: str
    """Keys of the result, joined by dots: of `summary.json` or, with `evaluation: ` before it, of `result.json`."""
    digits: int = 3
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A training run for each seed, or only numbers of the paper."""

    label: str
    words: tuple[str, ...] | None = ()
    """Overrides of train.py; None for a row that is not trained."""
    init: str | None = None
    """The label of the row whose model it continues."""
    paper: tuple[str, ...] = ()
    """What the paper prints in its columns."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The commands at one size."""

    words: tuple[str, ...]
    """Overrides of train.py in each row."""
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)
    evaluation: tuple[str, ...] | None = None
    """Overrides of eval.py, which evaluates the model of each row; None for no evaluation."""
    timed: bool = False
    """Whether seconds are compared. Then each run has its own annotation cache, and runs follow each other."""
    columns: tuple[Column, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Item:
    """A table or a figure."""

    title: str
    paper_columns: tuple[str, ...]
    """The columns of the paper's table."""
    sizes: Mapping[str, Size] = field(default_factory=dict)


COLUMNS = (
    Column(title="reward after training", path="validation.reward.after"),
    Column(title="gain, paired by prompt", path="validation.reward.gain"),
    Column(title="KL from the initial policy (nats)", path="kl", digits=2),
)
ESS = Column(title="effective sample size / n of the weights", path="ess", digits=2)
COSTS = (
    Column(title="annotation (s)", path="seconds.annotating", digits=0),
    Column(title="training (s)", path="seconds.training", digits=0),
    Column(title="tokens/s", path="tokens_per_second", digits=0),
)
MINUTE = ("model=smollm2-135m", "data=arithmetic", "strategy=auto")  # experiments/frontier: a minute for each run
BATCHES = (
    Row(label="B = 2", words=("data.micro_batch=2",), paper=("67.49",)),
    Row(label="B = 4", words=("data.micro_batch=4",), paper=("68.28",)),
    Row(label="B = 8", words=("data.micro_batch=8",), paper=("68.42",)),
    Row(label="8∗: 8 sampled candidates", words=("loss=var_sampled",), paper=("68.32",)),
)

ITEMS = {
    "table4": Item(
        title="VAR compared with GRPO, reward and time",
        paper_columns=("Avg. All, Qwen2.5-3B", "time"),
        sizes={
            "small": Size(
                words=("experiment=[table4,frontier]", *MINUTE),
                rows=(
                    Row(
                        label="GRPO",
                        words=("loss=grpo", "data.micro_batch=2", "data.global_batch=2"),
                        paper=("68.23", "2 h 54 min"),
                    ),
                    Row(label="VAR, the paper's", words=("loss=var", "data.global_batch=8"), paper=("67.25", "42 min")),
                    Row(label="VAR, prompt", words=("loss=var_prompt", "data.global_batch=8")),
                ),
                seeds=(0, 1, 2),
                timed=True,
                columns=(*COLUMNS, *COSTS[:2]),
            ),
            "paper": Size(
                words=("experiment=table4",),
                rows=(
                    Row(
                        label="GRPO",
                        words=("loss=grpo", "data.micro_batch=2", "data.global_batch=16"),
                        paper=("68.23", "2 h 54 min"),
                    ),
                    Row(label="VAR", words=("loss=var",), paper=("67.25", "42 min")),
                ),
                columns=(*COLUMNS, *COSTS),
            ),
        },
    ),
    "table7": Item(
        title="the number of rows that estimate Z",
        paper_columns=("Avg. of four benchmarks",),
        sizes={
            "small": Size(
                words=("experiment=ablate_b",),
                rows=(*BATCHES, Row(label="SFT", words=("loss=sft",))),
                columns=(*COLUMNS, ESS),
            ),
            "paper": Size(
                words=("experiment=table7",),
                rows=BATCHES,
                columns=(*COLUMNS, ESS),
            ),
        },
    ),
}
