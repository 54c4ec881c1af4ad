"""The peak memory of this process, from a moment on: of its GPU, or of the process itself if it uses none."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak() -> bool:
    """Return freed memory to the device, and let `read_peak` report the peak from now on.

    Return whether it can. On a CPU this requires Linux.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # it would count again
    try:
        (PROCESS / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        read_peak()
    except (OSError, LookupError):
        return False
    return True


def read_peak() -> dict[str, int]:
    """Return the peak in bytes since `reset_peak`.

    On a GPU: `allocated`, the bytes of tensors, and `reserved`, which PyTorch holds for them. On a CPU: `resident`, the
    memory of the process.
    """
    if torch.cuda.is_initialized():
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
    return {"resident": int(status["VmHWM"].split()[0]) * 1024}
