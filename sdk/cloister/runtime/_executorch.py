"""The only file that touches ExecuTorch's runtime.

Imports the bindings directly: `executorch.runtime` and `portable_lib` bring torchao, the exporter
and seconds of start-up along (executorch 1.4.1, `extension/pybindings/portable_lib.py`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cloister.backend import BACKENDS, CLOISTER
from cloister.errors import IncompatibleProgram, KernelsUnavailable, SettingError
from cloister.settings import Settings, processors
from cloister_kernels.library import PACKAGED, Builder, LibraryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cloister.manifest import ProgramEntry

__all__ = ["ExecutorchProgram", "Operators", "builder", "load", "operators_built", "own_operators",
           "runs_here", "share_weights", "timed_operators"]

_MOST_THREADS = 1024


@cache
def _bindings() -> Any:  # a compiled module without types
    from executorch.extension.pybindings import _portable_lib

    spec = importlib.util.find_spec("executorch")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name in {library for each in BACKENDS.values() for library in each.libraries}:
        torch.ops.load_library(str(root / name))
    return _portable_lib


def runs_here(program: ProgramEntry) -> bool:
    """Whether this machine has the program's backend, and this release its operators."""
    backend = BACKENDS.get(program.backend)
    if backend is None or backend.operator_abi != program.operator_abi:
        return False
    if backend is CLOISTER:
        return isinstance(own_operators(), Operators)
    return backend.registered in _bindings()._get_registered_backend_names()


@dataclass(frozen=True, kw_only=True)
class Operators:
    """Cloister's own operators, loaded."""

    path: Path
    chosen: str  # the instruction set
    sets: tuple[str, ...]  # those that this processor runs, best first

    @property
    def packaged(self) -> bool:
        """Whether the library came with the installed package, and was not built here."""
        return self.path.parent == PACKAGED


def builder(settings: Settings) -> Builder:
    """Return what builds and finds the library of Cloister's own operators."""
    path = Path(_bindings().__file__)
    return Builder(
        folder=settings.kernels, executorch=path.parents[2], release=version("executorch"),
        bindings=path, compiler=settings.compiler)


def operators_built(settings: Settings) -> bool:
    """Whether there is the library of Cloister's own operators that this release would build.

    Raises:
        KernelsUnavailable: it is not what was built, or others may write to it.
    """
    try:
        return builder(settings).find() is not None
    except LibraryError as error:
        raise KernelsUnavailable(str(error)) from None


@cache
def own_operators() -> Operators | KernelsUnavailable:
    """Load Cloister's own operators, built now if there are none; or say why that cannot be.

    A process does it once.
    """
    try:
        path = builder(Settings.from_environment()).build()
        library = ctypes.CDLL(str(path))
    except (LibraryError, OSError) as error:
        return KernelsUnavailable(str(error))
    for name in ("cloister_chosen", "cloister_sets"):
        getattr(library, name).restype = ctypes.c_char_p
    return Operators(
        path=path, chosen=library.cloister_chosen().decode(),
        sets=tuple(library.cloister_sets().decode().split()))


class _Call(ctypes.Structure):
    """See `cpu/profile.h` of the kernels."""

    _fields_ = (("which", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


_OPERATORS = ("linear", "linear, normed", "linear, gated", "linear, gated", "attention",
              "embedding", "norm")


def timed_operators(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Call, and return the name of each of Cloister's own operators that ran, and its seconds.

    They are in the order in which they ran. No other thread may run a program meanwhile.

    Raises:
        KernelsUnavailable: they cannot be built or loaded here.
    """
    operators = own_operators()
    if isinstance(operators, KernelsUnavailable):
        raise operators
    library = ctypes.CDLL(str(operators.path))
    library.cloister_profile(True)
    try:
        call()
        count = library.cloister_profiled(None, ctypes.c_int64(0))
        calls = (_Call * count)()
        library.cloister_profiled(calls, ctypes.c_int64(count))
    finally:
        library.cloister_profile(False)
    return [(_OPERATORS[each.which], each.nanoseconds / 1e9) for each in calls]


class _Option(ctypes.Structure):
    """A `BackendOption` whose value is a bool (executorch 1.4.1, runtime/backend/options.h)."""

    _fields_ = (("key", ctypes.c_char * 64), ("value", ctypes.c_bool * 256),
                ("alternative", ctypes.c_uint8))
    _align_ = 4


class _Options(ctypes.Structure):
    _fields_ = (("first", ctypes.POINTER(_Option)), ("count", ctypes.c_size_t))


def share_weights() -> None:
    """Switch XNNPACK's weights cache on, as builds of ExecuTorch for phones have it.

    It holds for all programs that this process loads from now on. The wheel has it off, and no
    Python function for it.

    Raises:
        IncompatibleProgram: this ExecuTorch has no such option.
    """
    library = ctypes.CDLL(_bindings().__file__)
    set_option = getattr(
        library, "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE", None)
    option = _Option(key=b"weight_cache_enabled")
    option.value[0] = True
    if set_option is not None:
        set_option.argtypes = [ctypes.c_char_p, _Options]
        failed = set_option(b"XnnpackBackend", _Options(ctypes.pointer(option), 1))
    if set_option is None or failed:
        raise IncompatibleProgram(
            "This ExecuTorch cannot switch XNNPACK's weights cache on; install release 1.4.")


def load(
    path: Path, layers: int, *, threads: int | None = None, first: str = "forward"
) -> ExecutorchProgram:
    """Load the program in `path`, from its file mapping, with the KV buffers of `layers` layers.

    The method `first` is loaded now, the other at its first use. Without `threads` it runs on as
    many as this process may use (ExecuTorch counts the machine's processors).

    Raises:
        IncompatibleProgram: this ExecuTorch cannot load it.
        SettingError: `threads` is not from 1 to 1024.
    """
    bindings = _bindings()
    if threads is not None:
        if not 1 <= threads <= _MOST_THREADS:  # the bindings take -1 for 2**32 - 1, and abort
            raise SettingError(f"threads is {threads}; it must be from 1 to {_MOST_THREADS}.")
        bindings._unsafe_reset_threadpool(threads)
    elif bindings._threadpool_get_thread_count() > (most := processors()):
        bindings._unsafe_reset_threadpool(most)
    try:
        # Of 200 programs with altered bytes 36 ended the process when loaded without the check.
        program = bindings._load_program(
            str(path), program_verification=bindings.Verification.InternalConsistency
        )
        return ExecutorchProgram(program, layers, first)
    except RuntimeError as error:
        raise IncompatibleProgram(
            f"Program {path.name} of bundle {path.parent.name} cannot be loaded by this "
            "ExecuTorch; export the bundle again with this release."
        ) from error


class _WithoutOpenMP:
    """Keeps a process's OpenMP from starting threads while programs run.

    Each of a program's threads multiplies matrices by torch's BLAS within `custom_sdpa`, and there
    would wait for OpenMP threads of its own: SmolLM2 reads 4 tokens in 4 ms without them, and in
    30 with them on two processors. In the libgomp of torch's wheels the bound is the process's,
    so that it holds for the threads that ExecuTorch starts.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if os.name == "posix" else None
        self._openmp = library if hasattr(library, "omp_set_max_active_levels") else None
        self._lock, self._inside, self._levels = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        if self._openmp is not None:
            with self._lock:
                if self._inside == 0:
                    self._levels = self._openmp.omp_get_max_active_levels()
                    self._openmp.omp_set_max_active_levels(0)
                self._inside += 1

    def __exit__(self, *_: object) -> None:
        if self._openmp is not None:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._openmp.omp_set_max_active_levels(self._levels)


_without_openmp = _WithoutOpenMP()


class ExecutorchProgram:
    """A loaded program (see `cloister.runtime.program.Program`).

    A method is loaded at its first use: XNNPACK packs the weights again for each.
    """

    def __init__(self, program: Any, layers: int, first: str) -> None:  # untyped bindings
        self._program, self._layers, self._first = program, layers, first
        self._methods: dict[str, Any] = {}
        self._method(first)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after the last token, int64[1, T] -> float32[1, V]."""
        return self.call("forward", tokens, torch.tensor([start]))[0]

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after every token, int64[1, T] -> float32[1, T, V]."""
        return self.outputs(tokens, start)[0]

    def outputs(self, tokens: torch.Tensor, start: int) -> list[torch.Tensor]:
        """Return every output of `score`: of an instrumented program they are more than one."""
        return self.call("score", tokens, torch.tensor([start]))

    def decode(self, vectors: torch.Tensor, start: int) -> torch.Tensor:
        """Logits after the last vector, float32[1, T, E] -> float32[1, V]."""
        return self.call("text_decoder", vectors, torch.tensor([start]))[0]

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors of a picture, uint8[1, 3, height, width] -> float32[1, N, E]."""
        return self.call("vision_encoder", pixels)[0]

    def hear(self, samples: torch.Tensor) -> torch.Tensor:
        """Vectors of a recording, float32[1, 1, samples] -> float32[1, N, E]."""
        return self.call("audio_encoder", samples)[0]

    def call(self, method: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return every output of a method; the next call of it overwrites them.

        Raises:
            IncompatibleProgram: the program cannot be run on these inputs.
        """
        try:
            with _without_openmp:
                out: list[torch.Tensor] = self._method(method)(list(inputs))
        except RuntimeError as error:
            raise IncompatibleProgram(
                f"Method {method} of this program failed; export the bundle again with this "
                "release.") from error
        return out

    def kv_buffers(self) -> Mapping[str, torch.Tensor]:
        """Live views of the KV buffers by name (see `cloister.runtime.program.Program`)."""
        names = (
            f"layers.{layer}.attn.{side}_cache"
            for layer in range(self._layers) for side in ("k", "v")
        )
        return {name: self._method(self._first).get_attribute(name) for name in names}

    def _method(self, name: str) -> Any:  # untyped bindings
        if name not in self._methods:
            self._methods[name] = self._program.load_method(name)
        return self._methods[name]
