"""The decode kernel in C++, where this machine has a compiler; without one torch's own kernels do the same work.

torch has no CPU kernel for one token over paged keys: its general one reads them head by head and costs a call for each
sequence. The source is compiled once for this very processor, in a second, and kept in the user's cache.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("decode_attention.cpp")
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")
# Compilers choose narrower vectors than these processors have, unless told.
_FLAGS_X86 = ("-mprefer-vector-width=512",)
_COMPILE_TIMEOUT_S = 60.0
_NAMES = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = [_pointer, _long, *[_pointer] * 5, *[_int] * 5, _long, _long, _float]


class DecodeKernel:
    """Attention of single tokens, all sequences of a batch in one call."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(
        self, query: Tensor, pool: Tensor, rows: Tensor, spans: Tensor, first_span: Tensor, out: Tensor, scale: float
    ) -> None:
        """Fill the rows of `out` that are meant.

        Args:
            query: [tokens, heads, head_dim].
            pool: [slots, 2, kv_heads, head_dim], a layer of the pool.
            rows: [sequences] int64, which tokens are meant.
            spans: [runs, 2] int64, slots from and up to.
            first_span: [sequences + 1] int64, where each sequence's runs begin.
            out: [tokens, heads * head_dim], contiguous.
        """
        heads, dim, kv_heads = query.shape[1], query.shape[2], pool.shape[2]
        if query.stride(2) != 1 or query.stride(1) != dim:
            query = query.contiguous()
        threads = torch.get_num_threads()
        parts = kv_heads if threads > len(rows) else 1
        self._function(
            query.data_ptr(),
            query.stride(0),
            rows.data_ptr(),
            pool.data_ptr(),
            spans.data_ptr(),
            first_span.data_ptr(),
            out.data_ptr(),
            len(rows),
            kv_heads,
            parts,
            heads // kv_heads,
            dim,
            pool.stride(0),
            pool.stride(1),
            scale,
        )


@cache
def decode_kernel(dtype: torch.dtype) -> DecodeKernel | None:
    """The kernel for this type; None where there is none, or no compiler."""
    name = _NAMES.get(dtype)
    library = _library() if name else None
    if name is None or library is None:
        return None
    function = getattr(library, name)
    function.argtypes, function.restype = _ARGUMENTS, None
    return DecodeKernel(function)


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    flags = _FLAGS + (_FLAGS_X86 if platform.machine() == "x86_64" else ())
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(flags).encode() + _processor().encode()).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych" / f"decode_attention-{key}.so"
    try:
        if not kept.exists():
            _compile([compiler, *flags], kept)
        return ctypes.CDLL(str(kept))
    except (OSError, subprocess.SubprocessError):
        return None


def _compile(command: list[str], target: Path) -> None:
    """In a place of its own first, so that of several processes none loads what another has half written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [*command, "-o", str(built), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        built.replace(target)


def _processor() -> str:
    """What the machine can do: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
