"""Backends: what export and runtime must agree on for a program to be made and run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cloister.errors import SettingError
from cloister_kernels.library import ABI

__all__ = ["BACKENDS", "CLOISTER", "COREML", "FURTHER", "KV", "NEVER_RUN", "VULKAN", "XNNPACK",
           "Backend", "backend"]


class KV(StrEnum):
    """What a program keeps keys and values in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"  # and a float32 scale for each head at each position

    def head_bytes(self, size: int) -> int:
        """Return the bytes of the keys, or the values, of a head of `size` at a position."""
        return {KV.FLOAT32: 4 * size, KV.FLOAT16: 2 * size, KV.INT8: size + 4}[self]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An ExecuTorch delegate, and the operators that its programs call beside it."""

    name: str  # in manifests, file names and options
    registered: str  # in ExecuTorch's registry of backends
    libraries: tuple[str, ...]  # of operators, within the `executorch` package
    operator_abi: int  # changes whenever an operator's arguments or meaning do
    methods: tuple[str, ...]  # of every program
    kv: tuple[KV, ...] = (KV.FLOAT32,)  # that its programs may have, the first by default

    def kv_of(self, name: str | None) -> KV:
        """Return what `name` says, or the default.

        Raises:
            SettingError: this backend has no such programs.
        """
        if name not in (None, *self.kv):
            raise SettingError(
                f"Programs for {self.name} keep keys and values in {' or '.join(self.kv)}, not "
                f"{name}; choose one of those.")
        return self.kv[0] if name is None else KV(name)


XNNPACK = Backend(
    name="xnnpack",
    registered="XnnpackBackend",
    libraries=(  # kernels of quantized embeddings; of attention and of KV updates
        "kernels/quantized/libquantized_ops_aot_lib.so",
        "extension/llm/custom_ops/libcustom_ops_aot_lib.so",
    ),
    operator_abi=1,
    methods=("forward", "score"),
)
CLOISTER = Backend(
    name="cloister",
    registered="",  # its operators are called by the program, not by a delegate
    libraries=(),  # built here: `cloister_kernels.library`
    operator_abi=ABI,
    methods=("forward", "score"),
    kv=(KV.FLOAT16, KV.INT8, KV.FLOAT32),
)
BACKENDS = {each.name: each for each in (XNNPACK, CLOISTER)}  # that export runs what it makes on

NEVER_RUN = "exported, never run here"
"""What manifest, receipt and display say of a program for a backend that no test of ours has."""

COREML = Backend(
    name="coreml", registered="CoreMLBackend", libraries=(), operator_abi=1, methods=("forward",),
    kv=(KV.FLOAT16,))
VULKAN = Backend(
    name="vulkan", registered="VulkanBackend", libraries=(), operator_abi=1, methods=("forward",))
FURTHER = {each.name: each for each in (COREML, VULKAN)}  # of which a bundle may hold programs


def backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        SettingError: there is none.
    """
    if name not in BACKENDS:
        raise SettingError(f"No backend is named {name!r}; choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]
