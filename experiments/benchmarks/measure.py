"""Measure a step: its time with fresh gradients, its peak memory in a forked process, and medians with intervals."""

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
    """Run steps with fresh gradients, as a training loop does. AdamW's learning rate is 0, so weights do not change."""

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.parameters, self.cuda = list(model.parameters()), options.device == "cuda"
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True) if options.optimizer else None

    def __call__(self, step: Step) -> tuple[float, float]:
        """Return seconds, and the loss or the table's mean. The outcome is kept until the next call."""
        self.clear()
        started = self.clock()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            self.output = step()
        if trains := self.output.requires_grad:
            self.output.backward()
        if self.optimizer and trains:
            self.optimizer.step()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = self.clock() - started
        self.output = self.output.detach()
        return seconds, self.output.mean().item()

    def clear(self) -> None:
        """Release the gradients."""
        for p in self.parameters:
            p.grad = None
        gc.collect()

    def outcome(self) -> Tensor:
        """Return the gradients of a loss, or a table, as one vector."""
        if self.output.ndim:
            return self.output.flatten()
        return torch.cat([p.grad.flatten() for p in self.parameters])

    def memory(self, step: Step) -> float:
        """Return MiB that a step adds at its peak: of resident memory on a CPU (Linux only), of torch's on CUDA."""
        self.clear()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
        before = torch.cuda.memory_allocated() / 2**20 if self.cuda else read_memory("VmRSS")
        self(step)
        return (torch.cuda.max_memory_allocated() / 2**20 if self.cuda else read_memory("VmHWM")) - before


def read_memory(key: str) -> float:
    """Return MiB of a line of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 2**10


def return_freed_memory() -> None:
    """Let malloc return each freed block of 128 KiB or more to the system.

    Then resident memory is what a step holds now. Otherwise peaks vary by a few percent. CUDA memory is not affected.
    """
    ctypes.CDLL("libc.so.6").mallopt(-3, 128 * 1024)  # M_MMAP_THRESHOLD, which otherwise grows with freed blocks


def run_forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call in a forked process. Use it before this process computes: threads do not fork."""
    with multiprocessing.get_context("fork").Pool(
        1, initializer=return_freed_memory if sys.platform == "linux" else None
    ) as pool:
        return pool.apply(function, arguments)


def bootstrap_median(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95% bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[1949]
