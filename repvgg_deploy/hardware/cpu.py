"""The CPU as the system describes it: its name, and the instructions that decide how fast and how it multiplies."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from repvgg_deploy.errors import DeployError

_SMALLER = "a smaller batch or size"

# Named as in /proc/cpuinfo; each multiplies bytes and adds in 32 bits.
_INTEGER_INSTRUCTIONS = {
    "amx_int8": "AMX-INT8",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "i8mm": "NEON int8 matrix product",
    "asimddp": "NEON dot product",
}


@dataclass(frozen=True)
class Cpu:
    """What `/proc/cpuinfo` says of the first core; empty fields where there is no such file.

    `flags` are the instruction sets as the kernel names them.
    """

    model: str
    family_model_stepping: tuple[str | None, ...]
    flags: frozenset[str]

    @property
    def integer_instructions(self) -> str:
        """The instructions for products of bytes, for people; `unknown` if the system does not say."""
        found = [name for flag, name in _INTEGER_INSTRUCTIONS.items() if flag in self.flags]
        if found:
            return ", ".join(found)
        if "avx2" in self.flags:
            return "AVX2 without VNNI"
        if "sse4_1" in self.flags:
            return "SSE4.1 without VNNI"
        return "NEON without dot product" if "asimd" in self.flags else "unknown"


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> Cpu:
    """The CPU of this machine."""
    fields: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return Cpu(
        fields.get("model name") or platform.processor() or platform.machine(),
        tuple(fields.get(key) for key in ("cpu family", "model", "stepping")),
        # `Features` on Arm.
        frozenset((fields.get("flags") or fields.get("Features") or "").split()),
    )


_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = _CGROUPS) -> int:
    """The cores that this process may use: those that it is bound to, or fewer if its container's share is less."""
    return core_limit(cgroups) or _bound_cores()


def core_limit(cgroups: Path = _CGROUPS) -> int | None:
    """A container's share of the CPU in cores, rounded up (`docker run --cpus`); None if it is not the limit.

    Libraries start as many threads as there are cores all the same, which the kernel then stops in turn.
    """
    # Version 2 of cgroups has both figures in one file, version 1 each in its own.
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroups / name).read_text(encoding="ascii") for name in names).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):
            # No such file, or `max`.
            continue
        share = -(-quota // period) if quota > 0 and period > 0 else 0
        return share if 0 < share < _bound_cores() else None
    return None


def _bound_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The memory of this machine; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def require_memory(size: int, what: str) -> None:
    """Raise DeployError if `size` bytes exceed this machine's memory.

    A system that promises more memory than there is would end the process when the promised memory is written to.

    Raises:
        DeployError: `what` needs more.
    """
    most = memory_bytes()
    if most is not None and size > most:
        raise DeployError(f"{what} needs {size / 2**30:.1f} GiB, and this machine has {most / 2**30:.1f}", _SMALLER)
