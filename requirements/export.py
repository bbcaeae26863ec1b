"""Write requirements/cpu.txt: the packages of `.[cpu]` with versions and hashes, without the address of any index.

    python requirements/export.py TORCH_VERSION

torch is left out, with the CUDA libraries that its default build needs: the image installs its CPU build first, whose
hashes differ from index to index. What torch needs besides is listed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "requirements" / "cpu.txt"
HEADER = "# Made by `make requirements`: what the image installs beside torch, for Linux, macOS and Windows.\n"
OF_CUDA = ("nvidia-", "cuda-", "triton")


def main(torch: str) -> None:
    """Resolve with and without torch, and write all but torch and its CUDA libraries."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    others = [need for need in wanted if not need.startswith("torch>")]
    own = set(resolve(others))
    found = resolve([*others, f"torch=={torch}"])
    kept = [block for name, block in found.items() if name in own or not (name == "torch" or name.startswith(OF_CUDA))]
    TARGET.write_text(HEADER + "".join(kept), encoding="utf-8")


def resolve(needs: list[str]) -> dict[str, str]:
    """The lines of each package that `needs` lead to, by name."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "needs.in", Path(folder) / "found.txt"
        source.write_text("\n".join(needs), encoding="utf-8")
        subprocess.run(
            [Path(sys.executable).with_name("uv"), "pip", "compile", "-q", "--universal", "--generate-hashes",
             "--no-header", "--no-annotate", "--no-emit-index-url", "--python-version", "3.11",
             "-c", ROOT / "constraints.txt", source, "-o", target],
            check=True,
        )  # fmt: skip
        text = target.read_text(encoding="utf-8")
    blocks = re.findall(r"^\S.*(?:\n +.*)*\n", text, flags=re.M)
    found: dict[str, str] = {}
    for block in blocks:
        # A package has one block per version that some Python needs.
        name = re.split(r"[= ;]", block, maxsplit=1)[0]
        found[name] = found.get(name, "") + block
    return found


if __name__ == "__main__":
    main(sys.argv[1])
