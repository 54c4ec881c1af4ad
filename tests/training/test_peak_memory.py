"""The peak memory of each stage, on a CPU and with the numbers of a pretended GPU, and in a summary."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.cli import check_run, read_summary
from tests.helpers.runs import fit, run_folder
from var.annotate.annotator import Annotator
from var.models.policy import Policy
from var.training.metrics import PeakMemory
from var.utils import peak_memory
from var.utils.distributed import Ranks

MIB = 2**20


def allocate(mebibytes: int) -> None:
    """Use memory for a moment."""
    torch.ones(mebibytes * MIB // 4).sum()


def test_peak_of_a_stage_leaves_out_what_earlier_ones_freed() -> None:
    peaks = PeakMemory()
    peaks.start("annotating")
    allocate(400)
    peaks.setup()
    allocate(800)  # between the stages
    peaks.on_train_start()
    allocate(100)
    with peaks.within("evaluating"):
        allocate(200)
    peaks.on_train_end()
    found = peaks.over_ranks()
    assert found is not None
    base = min(peak["resident"] for peak in found.values()) - 100 * MIB
    for stage, size in (("annotating", 400), ("training", 100), ("evaluating", 200)):
        assert found[stage]["resident"] - base == pytest.approx(size * MIB, abs=40 * MIB)


def test_many_small_allocations_of_annotation_do_not_count_in_training() -> None:
    """The C library keeps freed blocks that are too small for a mapping of their own."""
    peaks = PeakMemory()
    peaks.start("before")
    peaks.start("annotating")
    blocks = [torch.ones(4000) for _ in range(20_000)]  # 16 kB each, 320 MB
    kept = blocks[-1]  # in the way of the heap's end
    del blocks
    peaks.on_train_start()
    peaks.on_train_end()
    assert kept.sum() == 4000
    assert peaks.peaks["annotating"]["resident"] > peaks.peaks["before"]["resident"] + 250 * MIB
    assert peaks.peaks["training"]["resident"] < peaks.peaks["before"]["resident"] + 80 * MIB


class Gpu:
    """The numbers of PyTorch's allocator on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "peak", 0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: self.peak + 10)

    def allocate(self, size: int) -> None:
        """Use memory for a moment."""
        self.peak = max(self.peak, size)


def test_peaks_of_a_gpu_are_those_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is interrupted has the larger of its peaks, and of several ranks the largest counts."""
    gpu, peaks = Gpu(monkeypatch), PeakMemory()
    peaks.start("annotating")
    gpu.allocate(900)
    peaks.setup()
    gpu.allocate(800)
    peaks.on_train_start()
    gpu.allocate(500)
    with peaks.within("evaluating"):
        gpu.allocate(600)
    gpu.allocate(300)
    peaks.on_train_end()
    other = {"training": {"allocated": 400, "reserved": 700}, "evaluating": {"allocated": 601, "reserved": 602}}
    monkeypatch.setattr(Ranks, "collect", lambda self, own: [*own, other])
    assert peaks.over_ranks() == {
        "annotating": {"allocated": 900, "reserved": 910},
        "training": {"allocated": 500, "reserved": 700},
        "evaluating": {"allocated": 601, "reserved": 610},
    }


def test_peaks_that_cannot_be_reset_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside Linux the files are absent, and some kernels lack VmHWM."""
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "status").write_text("VmRSS:\t100 kB\n")
    for place in (tmp_path / "absent", tmp_path / "kernel"):
        monkeypatch.setattr(peak_memory, "PROCESS", place)
        peaks = PeakMemory()
        peaks.start("annotating")
        peaks.on_train_start()
        assert peaks.over_ranks() is None


def test_stages_of_a_run_follow_each_other(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation before training is neither annotation nor training, and the live reference is loaded before it."""
    stages, start, forward = list[Any](), PeakMemory.start, Policy.forward

    def watched(self: PeakMemory, stage: str | None) -> None:
        stages.append(stage)
        start(self, stage)

    def ran(self: Policy, batch: Any) -> Any:
        stages.append("trains" if torch.is_grad_enabled() else "scores")
        return forward(self, batch)

    monkeypatch.setattr(PeakMemory, "start", watched)
    monkeypatch.setattr(Policy, "forward", ran)
    monkeypatch.setattr("var.training.validation.evaluate_reference", report("samples", stages))
    more = ("loss=dpo", "reference=live", "data.validation_prompts=2", "eval.sampling.max_new_tokens=3")
    fit(options, tmp_path / "run", *more, "data.micro_batch=4", "data.global_batch=4", "trainer.max_steps=2")
    steps = ["scores", "trains"] * 2  # the reference, then the policy
    assert stages[:12] == [None, "evaluating", "samples", None, "training", *steps, None, "evaluating", "scores"]


def report(name: str, names: list[Any]) -> Any:
    """Return evaluate_reference, which notes that it is called."""
    from var.training.validation import evaluate_reference

    return lambda *arguments: (names.append(name), evaluate_reference(*arguments))[1]


@pytest.mark.e2e
def test_summary_has_seconds_and_peak_memory_of_each_stage(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Annotation uses 500 MB more for a moment, before the run and for its evaluation. Training does not have them."""
    fill = Annotator.fill
    monkeypatch.setattr(Annotator, "fill", lambda *given, **named: (allocate(500), fill(*given, **named))[1])
    more = ("loss=var", "data.micro_batch=4", "data.global_batch=4", "trainer.max_steps=2", "trainer.precision=32-true")
    check_run("train.py", *options, *more, "data.validation_prompts=2")
    summary = read_summary(run_folder(tmp_path / "runs"))
    assert list(summary["seconds"]) == ["annotating", "training", "evaluating"]
    assert min(summary["seconds"].values()) > 0
    assert summary["tokens_per_second"] > 0
    peaks = summary["peak_memory"]
    assert list(peaks) == ["annotating", "evaluating", "training", "exporting"]
    assert all(list(peak) == ["resident"] for peak in peaks.values())
    for stage in ("annotating", "evaluating"):
        assert peaks[stage]["resident"] - peaks["training"]["resident"] > 300 * MIB
