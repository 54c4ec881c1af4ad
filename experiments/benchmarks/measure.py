"""How a step is measured: time on fresh gradients, peak memory in a forked process, medians with their intervals."""

import argparse
import ctypes
import gc
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps import Step
from torch import Tensor


class Runner:
    """Runs a step on fresh gradients, as a training loop would. AdamW's rate is 0, so that the weights stay."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.parameters, self.cuda = list(model.parameters()), options.device == "cuda"
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True) if options.optimizer else None

    def __call__(self, step: Step) -> tuple[float, float]:
        """Seconds, and the loss or the table's mean; the outcome stays until the next call."""
        self.clear()
        begin = self.clock()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            self.output = step()
        if trains := self.output.requires_grad:
            self.output.backward()
        if self.optimizer and trains:
            self.optimizer.step()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = self.clock() - begin
        self.output = self.output.detach()
        return seconds, self.output.mean().item()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None
        gc.collect()

    def outcome(self) -> Tensor:
        """The gradients of a loss, or a table, as one vector."""
        if self.output.ndim:
            return self.output.flatten()
        return torch.cat([p.grad.flatten() for p in self.parameters])

    def memory(self, step: Step) -> float:
        """MiB that a step adds at its peak; on a CPU resident memory, Linux only, on CUDA what torch allocates."""
        self.clear()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
        before = torch.cuda.memory_allocated() / 2**20 if self.cuda else resident("VmRSS")
        self(step)
        return (torch.cuda.max_memory_allocated() / 2**20 if self.cuda else resident("VmHWM")) - before


def resident(key: str) -> float:
    """MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 2**10


def give_back() -> None:
    """malloc returns each block from 128 KiB on to the system when it is freed, so that resident memory is what a step
    holds and not what it once held: without this peaks scatter by some percent. No effect on CUDA's."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD, which otherwise grows with what is freed


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own; only before this one computes anything (threads do not fork)."""
    with multiprocessing.get_context("fork").Pool(
        1, initializer=give_back if sys.platform == "linux" else None
    ) as pool:
        return pool.apply(function, arguments)


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95% bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]
