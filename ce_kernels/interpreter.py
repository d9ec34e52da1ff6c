"""Runs a launch on host arrays through Triton's interpreter (TRITON_INTERPRET=1 in the environment), without torch."""

import ctypes
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ce_kernels.launch import Launch

_TRITON_DTYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
}

# The interpreter keeps its state in module globals.
_lock = threading.Lock()


class _HostPointer:
    """The part of a tensor that the interpreter uses: a pointer and a dtype. The memory is the host's already."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.dtype = _TRITON_DTYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self._array.__array_interface__["data"][0]

    def untyped_storage(self) -> "_HostPointer":
        return self

    def cpu(self) -> "_HostPointer":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_HostPointer":
        return self

    def set_(self, *_: Any) -> None: ...

    def copy_(self, *_: Any) -> None: ...

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self._array.shape

    def stride(self) -> tuple[int, ...]:
        return self._array.strides


def run(launch: Launch, arguments: Mapping[str, Any]) -> None:
    """Runs the kernel on arguments by parameter name: array-likes (written in place), numbers, None for the rest.

    Programs run one after the other. Those that wait for one another leave in a first run what they have to say.
    """
    from ce_kernels import kernels

    kernel = getattr(kernels, launch.kernel)
    values = {
        name: value if value is None or isinstance(value, int | float) else _HostPointer(np.asarray(value))
        for name, value in arguments.items()
    }
    values = dict.fromkeys(kernel.arg_names) | values | dict(launch.constants)
    zeroed = [np.asarray(arguments[output.name]) for output in launch.outputs if output.zeroed]
    with _lock, np.errstate(all="ignore"):
        for words in zeroed:
            ctypes.memset(words.ctypes.data, 0, words.nbytes)
            # The logits are not to be overwritten yet.
            logits = _HostPointer(np.asarray(arguments["logits_ptr"]).copy())
            kernel[launch.grid](**values | {"logits_ptr": logits})
        kernel[launch.grid](**values)
