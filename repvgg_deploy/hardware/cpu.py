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
        frozenset((fields.get("flags") or fields.get("Features") or "").split()),
    )


def memory_bytes() -> int | None:
    """The memory of this machine; None if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def require_memory(size: int, what: str) -> None:
    """Raise DeployError if `size` bytes exceed this machine's memory, or the process's limit.

    A system that promises more memory than there is would end the process when the promised memory is written to.

    Raises:
        DeployError: `what` needs more.
    """
    most = memory_bytes()
    if most is not None and size > most:
        raise DeployError(f"{what} needs {size / 2**30:.1f} GiB, and this machine has {most / 2**30:.1f}", _SMALLER)
