"""A pretend accelerator: a device in pure Python, to test device code on a machine without one.

Tensors on `DEVICE` are computed on the CPU. As with CUDA, an operation that mixes them with CPU tensors is an error,
and operations at which the host waits for the device are recorded in `syncs`.

    with Pretend():
        model = model.to(DEVICE)
        model(batch.to(DEVICE, non_blocking=True)).sum().backward()
    print(syncs)

Importing this module registers the device in the process, which must be before torch's first backward pass. So the
tests of `tests/pretend` run in a process of their own (its conftest.py).

Limits: autocast is passed through and not performed. A copy that does not block is taken to be from pinned memory. The
device says nothing about kernels, memory or speed.
"""

import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = str(Path(__file__).parents[2])
NAME = "pretend"

syncs: list[str] = []
"""Each time the host waited for the device: the operation, and the innermost line of the repository."""

# Operations whose result, or its shape, is read by the host. `index` and `where` depend on their arguments: `_waits`.
READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::masked_select", "aten::bincount", "aten::histc", "aten::_assert_async",
}  # fmt: skip
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class _Backend(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        """Return whether this process runs the tests of this device. Others would use it where they find one."""
        return multiprocessing.parent_process() is not None

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, *_: Any) -> None:
        pass

    def manual_seed_all(self, *_: Any) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)


class DeviceTensor(Tensor):
    """A tensor on `DEVICE`."""

    raw: Tensor
    """Its values, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "DeviceTensor":
        """Wrap a CPU tensor, which is not copied."""
        out: DeviceTensor = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=DEVICE,
        )  # fmt: skip
        out.raw = raw
        return out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.raw})"

    def tolist(self) -> Any:
        """Return the values as torch does for a plain tensor."""
        _record("tolist")
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _dispatch(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Make `DEVICE` usable in factories and `.to` within the context, and clear `syncs` at its start."""

    def __enter__(self) -> Any:
        syncs.clear()
        self._swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied parameters stay tied
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(self._swaps)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _dispatch(func, args, kwargs or {})


def to_host(value: Tensor) -> Tensor:
    """Return a tensor's values on the CPU, without counting a synchronization."""
    return value.raw if isinstance(value, DeviceTensor) else value


def _record(operation: str) -> None:
    """Record a synchronization at the innermost line of the repository, and the library's line that caused it."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and path != __file__ and "site-packages" not in path:
            syncs.append(f"{operation} at {path[len(ROOT) + 1 :]}:{frame.f_lineno}{library}")
            return
        if not library and "site-packages" in path and "site-packages/torch/" not in path:
            library = f" in {path.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    syncs.append(f"{operation} outside the repository{library}")


def _dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation on the CPU, and put its result where CUDA would."""
    name, kwargs = func._schema.name, dict(kwargs)
    if name in EMULATED:
        return EMULATED[name](*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    if on_device:
        _check_devices(name, tensors)
    target = DEVICE if on_device else torch.device("cpu")
    for i, value in enumerate(args):  # in inference mode, `Tensor.to` arrives here undivided
        if isinstance(value, torch.device):
            target = value
            args = [*args[:i], torch.device("cpu") if value.type == NAME else value, *args[i + 1 :]]
    if kwargs.get("device") is not None:
        target = torch.device(kwargs["device"])
        if target.type == NAME:
            kwargs["device"] = torch.device("cpu")
    if name == "aten::copy_":
        target = args[0].device
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    generator = kwargs.get("generator")
    if generator is not None and target.type == NAME and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: a CPU generator for a tensor on {DEVICE}")
    if (on_device or target.type == NAME) and (wait := _waits(func, args, kwargs, tensors, target)):
        _record(wait)
    out = func(*tree_map(_raw, tuple(args)), **tree_map(_raw, kwargs))
    written = {id(to_host(t)): t for t in tensors} if func._schema.is_mutable else {}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
            return value
        return written.get(id(value), DeviceTensor(value) if target.type == NAME else value)

    return tree_map(wrap, out)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, DeviceTensor) else value


def _check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise an error if a CPU tensor meets one on the device. As on CUDA, it can be a scalar, an index or be copied."""
    for tensor in tensors:
        if not isinstance(tensor, DeviceTensor) and tensor.dim() > 0 and name not in (*COPIES, *INDEXES):
            raise RuntimeError(f"{name}: a CPU tensor {tuple(tensor.shape)} {tensor.dtype} meets one on {DEVICE}")


def _waits(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor], target: torch.device
) -> str | None:
    """Return what the host waits for, or None if it only queues the operation."""
    name = func._schema.name
    hosts = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if name in READS:
        return str(name)
    if name in COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, DeviceTensor) and target.type == "cpu":
            return "copy to the host"
        blocks = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
        return "copy from the host" if hosts and target.type == NAME and blocks else None
    if name in INDEXES:
        indices = [index for index in args[1] if index is not None]
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        fills = name != "aten::index" and len(indices) == 1 and args[2].dim() == 0  # becomes masked_fill
        if masks and not fills:
            return f"{name} with a mask"
        return f"{name} with an index from the host" if any(not isinstance(i, DeviceTensor) for i in indices) else None
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return str(name)
    return f"{name} with a number from the host" if name == "aten::where" and hosts else None


# torch.nn.attention.varlen: causal attention within sequences that share a row of tokens.


def _attention_weights(q: Tensor, k: Tensor, ends: Tensor, scale: float | None, window: Sequence[int] | None) -> Any:
    """Yield for each sequence its rows, and its attention weights [H, n, n] and their normalizers in float32."""
    left, right = window or (-1, -1)
    repeat = q.shape[1] // k.shape[1]
    for start, stop in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        rows, at = slice(start, stop), torch.arange(stop - start)
        queries, keys = (t[rows].transpose(0, 1).float() for t in (q, k))
        scores = queries @ keys.repeat_interleave(repeat, 0).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.zeros(len(at), len(at), dtype=torch.bool)
        for reach, distance in ((left, at[:, None] - at), (right, at - at[:, None])):
            hidden |= (distance > reach) & (reach >= 0)
        scores = scores.masked_fill(hidden, -torch.inf)
        yield rows, scores.softmax(-1), scores.logsumexp(-1)


def _varlen(
    q: Any, k: Any, v: Any, q_ends: Any, k_ends: Any, q_max: int, k_max: int, causal: bool = False,
    scale: float | None = None, window_size: Sequence[int] | None = None, *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """Emulate the kernel: it takes one dtype, and boundaries in int32 on the device that are the same for q and k."""
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise RuntimeError(f"varlen_attn: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if {type(t) for t in (q, k, v, q_ends, k_ends)} != {DeviceTensor}:
        raise RuntimeError(f"varlen_attn: not all of q, k, v and the boundaries are on {DEVICE}")
    ends = q_ends.raw
    assert torch.equal(ends, k_ends.raw)
    assert ends.dtype == torch.int32
    assert ends[-1] == len(q)
    assert ends.diff().max() <= min(q_max, k_max)
    values = v.raw.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    out, normalizers = torch.empty_like(q.raw), torch.empty(q.shape[1], len(q))
    for rows, weights, normalizer in _attention_weights(q.raw, k.raw, ends, scale, window_size):
        out[rows] = (weights @ values[rows].transpose(0, 1)).transpose(0, 1).to(out.dtype)
        normalizers[:, rows] = normalizer
    return DeviceTensor(out), DeviceTensor(normalizers), DeviceTensor(torch.zeros(2, dtype=torch.uint64))


def _varlen_backward(
    gradient: Any, q: Any, k: Any, v: Any, out: Any, normalizer: Any, q_ends: Any, k_ends: Any, q_max: int, k_max: int,
    causal: bool, state: Any, scale: float | None = None, window: Sequence[int] | None = None,
) -> Any:  # fmt: skip
    """Emulate its backward pass."""
    q, k, v, gradient = (t.raw for t in (q, k, v, gradient))
    grads = [torch.zeros_like(t, dtype=torch.float32) for t in (q, k, v)]
    repeat, factor = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    for rows, weights, _ in _attention_weights(q, k, q_ends.raw, scale, window):
        queries, upstream = (t[rows].transpose(0, 1).float() for t in (q, gradient))
        keys, values = (t[rows].transpose(0, 1).float().repeat_interleave(repeat, 0) for t in (k, v))
        slope = upstream @ values.mT
        slope = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * factor
        for grad, part in zip(grads, (slope @ keys, slope.mT @ queries, weights.mT @ upstream), strict=True):
            grad[rows] = part.unflatten(0, (grad.shape[1], -1)).sum(1).transpose(0, 1)
    return tuple(DeviceTensor(grad.to(q.dtype)) for grad in grads)


EMULATED: dict[str, Callable[..., Any]] = {
    "aten::_has_compatible_shallow_copy_type": lambda one, other: type(one) is type(other),
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}


# What torch calls below the level of `__torch_dispatch__`, for example to make a tensor of Python numbers.


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, *_: Any, **__: Any) -> Tensor:
    return DeviceTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Tensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy a tensor that torch made of Python numbers: for `torch.tensor`, or as an index."""
    _record("copy from the host")
    to_host(target).copy_(to_host(source))
    return target


_aten = torch.library.Library("aten", "IMPL", "PrivateUse1")
_aten.impl("empty.memory_format", _empty)
_aten.impl("empty_strided", _empty_strided)
_aten.impl("_copy_from", _copy_from)
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)
