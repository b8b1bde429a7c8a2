"""Kernels in C++, where this machine has a compiler; without one torch's own do the same work.

torch has no CPU kernel for one token over paged keys: its general one reads them head by head and costs a call for each
sequence. And its norms and rotations are chains of small operations. The source is compiled once for this very
processor, in two seconds, and kept in the user's cache.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

log = structlog.get_logger()

_SOURCES = Path(__file__).with_name("cpp")
_SOURCE = _SOURCES / "kernels.cpp"
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
# Without the flags above: told of fast mathematics, a linker would have the whole process round tiny numbers to 0.
_LINK_FLAGS = ("-shared", "-fopenmp")
# Compilers choose narrower vectors than these processors have, unless told.
_FLAGS_X86 = ("-mprefer-vector-width=512",)
_COMPILE_TIMEOUT_S = 60.0
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "attend": [_pointer, _long, *[_pointer] * 5, *[_int] * 5, _long, _long, _float],
    "norm": [*[_pointer] * 3, _int, _int, _float],
    "prepare": [_pointer, _pointer, _float, *[_pointer] * 4, *[_int] * 4, _long, _long],
    "pair": [],
    "layers": [*[_pointer] * 3, _int, _int],
    "product": [*[_pointer] * 4, *[_int] * 3],
}


class ModelShape(ctypes.Structure):
    """``Model`` of cpp/decoder.h."""

    _fields_ = (
        *((name, _int) for name in ("hidden", "inner", "query_heads", "key_heads", "dim", "activation")),
        *((name, _float) for name in ("epsilon", "scale")),
        *((name, _long) for name in ("token_stride", "layer_stride", "value_offset")),
        *((name, _pointer) for name in ("cos", "sin")),
    )


class LayerWeights(ctypes.Structure):
    """``Layer`` of cpp/decoder.h."""

    _fields_ = (
        ("window", _long),
        *(
            (name, _pointer)
            for name in (
                *("before", "between", "heads"),
                *("qkv", "out", "gate_up", "down"),
                *("qkv_bias", "out_bias", "gate_up_bias", "down_bias"),
            )
        ),
    )


class Pass(ctypes.Structure):
    """``Pass`` of cpp/decoder.h."""

    _fields_ = (
        *((name, _int) for name in ("tokens", "chunks")),
        *((name, _pointer) for name in ("positions", "slots", "chunk")),
        *((name, _pointer) for name in ("hidden", "normed", "heads", "attended", "inner", "pool")),
        *((name, ctypes.POINTER(_pointer)) for name in ("spans", "first_span")),
    )


class Kernels:
    """The kernels for one type of numbers; tensors are on the CPU and of that type where nothing else is said."""

    def __init__(self, library: ctypes.CDLL, dtype: str) -> None:
        self._attend = _function(library, "attend", dtype)
        self._norm = _function(library, "norm", dtype)
        self._prepare = _function(library, "prepare", dtype)
        pair: int = _function(library, "pair", dtype, _int)()
        self.decoder = DecoderKernels(self, library, dtype, pair) if pair else None

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root mean square norm.

        Args:
            x: [rows, size], contiguous.
            weight: [size] float32, contiguous.
        """
        out = torch.empty_like(x)
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], epsilon)
        return out

    def prepare(
        self,
        heads: Tensor,
        weight: Tensor | None,
        epsilon: float,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        pool: Tensor,
    ) -> None:
        """Norm and turn queries and keys in place, and write keys and values to the pool.

        Args:
            heads: [tokens, heads + 2 * kv_heads, head_dim], contiguous: queries, keys, values.
            weight: [heads + kv_heads, head_dim] float32, of the norm of each head; None: they are not normed.
            cos, sin: [tokens, head_dim / 2] float32, contiguous.
            slots: [tokens] int64.
            pool: [slots, 2, kv_heads, head_dim], a layer of the pool.
        """
        kv_heads = pool.shape[2]
        self._prepare(
            heads.data_ptr(),
            None if weight is None else weight.data_ptr(),
            epsilon,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            pool.data_ptr(),
            heads.shape[0],
            heads.shape[1] - 2 * kv_heads,
            kv_heads,
            heads.shape[2],
            pool.stride(0),
            pool.stride(1),
        )

    def attend(
        self, query: Tensor, pool: Tensor, rows: Tensor, spans: Tensor, first_span: Tensor, out: Tensor, scale: float
    ) -> None:
        """Attention of single tokens, of all sequences in one call: fill the rows of `out` that are meant.

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
        self._attend(
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


class DecoderKernels:
    """Those that take a whole decoder's packed weights; ``pair`` is how many inputs of an output lie side by side."""

    def __init__(self, kernels: Kernels, library: ctypes.CDLL, dtype: str, pair: int) -> None:
        self.pair = pair
        self.norm = kernels.norm
        self._layers = _function(library, "layers", dtype)
        self._product = _function(library, "product", dtype)

    def run_layers(
        self, shape: ModelShape, layers: "ctypes.Array[LayerWeights]", done: Pass, numbers: range | None = None
    ) -> None:
        """Layers of a pass, all of them if none are named: what they begin with in ``hidden`` becomes their result."""
        numbers = range(len(layers)) if numbers is None else numbers
        self._layers(ctypes.byref(shape), layers, ctypes.byref(done), numbers.start, numbers.stop)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        """x W^T + b, [rows, outputs] float32, for x [rows, inputs] and a packed weight."""
        out = torch.empty(x.shape[0], outputs)
        address = None if bias is None else bias.data_ptr()
        self._product(x.data_ptr(), weight.data_ptr(), address, out.data_ptr(), x.shape[0], x.shape[1], outputs)
        return out


def _function(
    library: ctypes.CDLL, name: str, dtype: str, result: type[ctypes.c_int] | None = None
) -> Callable[..., Any]:
    function = getattr(library, f"{name}_{dtype}")
    function.argtypes, function.restype = _ARGUMENTS[name], result
    return function  # type: ignore[no-any-return]


@cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """Those for this type; None where there are none, or no compiler."""
    name = _NAMES.get(dtype)
    library = _library() if name else None
    return Kernels(library, name) if name and library is not None else None


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("c++")
    if compiler is None:
        _say_without("no program is called c++")
        return None
    flags = _FLAGS + (_FLAGS_X86 if platform.machine() == "x86_64" else ())
    key = hashlib.sha256(
        b"".join(file.read_bytes() for file in sorted(_SOURCES.iterdir()))
        + repr((flags, _LINK_FLAGS)).encode()
        + _processor().encode()
    ).hexdigest()[:16]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych" / f"kernels-{key}.so"
    try:
        if not kept.exists():
            _compile(compiler, flags, kept)
        return ctypes.CDLL(str(kept))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        _say_without(f"{compiler} failed: {lines[0] if lines else f'exit status {error.returncode}'}")
    except (OSError, subprocess.SubprocessError) as error:
        _say_without(str(error))
    return None


def _say_without(reason: str) -> None:
    """Say once in a process's life why it is slower than it could be."""
    remedy = "install a C++ compiler with OpenMP, such as g++, and start again"
    log.warning("no kernels of our own: torch's compute the same, more slowly", reason=reason, remedy=remedy)


def _compile(compiler: str, flags: Sequence[str], target: Path) -> None:
    """In a place of its own first, so that of several processes none loads what another has half written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        object_file, built = str(Path(folder) / "kernels.o"), Path(folder) / target.name
        for command in (
            [compiler, *flags, "-c", str(_SOURCE), "-o", object_file],
            [compiler, *_LINK_FLAGS, object_file, "-o", str(built)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        built.replace(target)


def _processor() -> str:
    """What the machine can do: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
