"""The one place that reads the environment and finds directories."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

__all__ = ["Settings", "model_folders", "processor", "processors", "share_processor",
           "under_torchrun"]

_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Directories, and how the vault is opened."""

    home: Path  # user data: CLOISTER_HOME, else where the platform has it
    data: Path | None  # public data sets: CLOISTER_DATA
    keyfile: Path | None = None  # of the vault: CLOISTER_KEYFILE, else beside the vault
    passphrase: str | None = field(default=None, repr=False)  # CLOISTER_PASSPHRASE
    provider: str | None = None  # of the vault's key, and no other: CLOISTER_PROVIDER
    compiler: str = "c++"  # for the operators' library: CLOISTER_COMPILER

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the variables CLOISTER_HOME, _DATA, _KEYFILE, _PASSPHRASE and _PROVIDER now."""
        home, data, keyfile = (
            os.environ.get(f"CLOISTER_{name}") for name in ("HOME", "DATA", "KEYFILE"))
        return cls(
            home=Path(home) if home else platformdirs.user_data_path("cloister", appauthor=False),
            data=Path(data) if data else None,
            keyfile=Path(keyfile) if keyfile else None,
            passphrase=os.environ.get("CLOISTER_PASSPHRASE") or None,
            provider=os.environ.get("CLOISTER_PROVIDER") or None,
            compiler=os.environ.get("CLOISTER_COMPILER") or "c++",
        )

    @property
    def seen_programs(self) -> Path:
        """The file with hashes of programs that this machine has checked before."""
        return self.home / "programs.json"

    @property
    def kernels(self) -> Path:
        """The folder of the operators' libraries that were built here."""
        return self.home / "kernels"

    @property
    def vault(self) -> Path:
        """The directory of the vault."""
        return self.home / "vault"


def model_folders() -> dict[str, Path]:
    """Where other programs keep their models, each by its own variables and defaults."""
    given = os.environ.get
    home = Path.home()
    cache = Path(given("XDG_CACHE_HOME") or home / ".cache")
    hub = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or (
        Path(given("HF_HOME") or cache / "huggingface") / "hub")
    return {
        "Hugging Face": Path(hub).expanduser(),
        "Ollama": Path(given("OLLAMA_MODELS") or home / ".ollama" / "models").expanduser(),
        "LM Studio": home / ".lmstudio" / "models",
        "LM Studio, before 0.3": home / ".cache" / "lm-studio" / "models",
    }


def processor() -> str:
    """Return the name of this machine's kind of processor."""
    try:  # Linux names it there alone, and not on every architecture
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, (*names, platform.processor(), platform.machine())), "unknown")


def processors() -> int:
    """How many processors this process may use: those it is bound to, within its group's quota.

    Libraries count the machine's; in a container with a share of a large machine they would start
    many times the threads that can run.
    """
    bound = getattr(os, "sched_getaffinity", None)  # not on every system
    count = len(bound(0)) if bound is not None else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, int(quota + 0.5)))


def _quota() -> float | None:
    """Processors that the process's control group may use on average; None: no bound.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst.
    """
    for pair in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((_GROUPS / name).read_text() for name in pair).split()
            quota, period = words[0], float(words[1])
            return None if quota in ("max", "-1") else float(quota) / period
        except (OSError, ValueError, IndexError):  # another version of groups, or none
            continue
    return None


def share_processor() -> None:
    """Choose threads so that busy programs beside cost their share; before torch is imported.

    OpenMP's threads spin for each other by default, which brings a process to a standstill where
    other programs keep the processor busy: here they sleep. They are as many as the process may
    use at once. Settings of the user's own stand.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if _quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one of several that share a run."""
    return "TORCHELASTIC_RUN_ID" in os.environ
