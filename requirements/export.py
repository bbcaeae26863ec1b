"""Write requirements/*.txt: what the images install, with versions and hashes, without the address of any index.

    python requirements/export.py TORCH_VERSION

| file | what |
| --- | --- |
| `cpu.txt` | `.[cpu]` less torch, whose CPU builds have other hashes in each index; what torch needs is there |
| `pull.txt`, `rtx.txt`, `serve.txt` | what these extras add to that |
| `gpu.txt` | `.[gpu]` and CUDA for Python, with the default build of torch and its CUDA libraries |
| `sbom.txt` | the tool that lists an image's packages; it stays out of the image |
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
HEADER = "# Made by `make requirements`: {what}, for Linux, macOS and Windows.\n"
OF_CUDA = ("nvidia-", "cuda-", "triton")
EXTRAS = ("pull", "rtx", "serve")


def main(torch: str) -> None:
    """Resolve each file's packages and write it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs, extras = project["dependencies"], project["optional-dependencies"]
    others = [need for need in [*needs, *extras["cpu"]] if not need.startswith("torch>")]
    own = set(resolve(others))
    found = resolve([*others, f"torch=={torch}"])
    kept = {name: b for name, b in found.items() if name in own or not (name == "torch" or name.startswith(OF_CUDA))}
    write("cpu", "what the CPU image installs beside torch", kept)
    for extra in EXTRAS:
        # Together with the rest, so that both files have the same version of what is in both.
        together, alone = resolve([*others, *extras[extra]]), resolve(extras[extra])
        added = {name: block for name, block in together.items() if name in alone and name not in kept}
        write(extra, f"what the extra `{extra}` adds to the CPU image", added)
    write("gpu", "what the GPU image installs", resolve([*needs, *gpu_needs(extras), f"torch=={torch}"]))
    write("sbom", "the tool that writes the images' bills of materials", resolve(["cyclonedx-bom"]))


def gpu_needs(extras: dict[str, list[str]]) -> list[str]:
    """ONNX Runtime in the version of the CPU image, and what engines run with; TensorRT itself comes with the base."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    version = re.search(r"^onnxruntime==(\S+)$", pins, flags=re.M)
    assert version is not None
    cuda = [need for need in extras["tensorrt"] if need.startswith("cuda-python")]
    return [*extras["gpu"], f"onnxruntime-gpu=={version[1]}", *cuda]


def write(name: str, what: str, blocks: dict[str, str]) -> None:
    """One file, of the blocks of its packages."""
    (FOLDER / f"{name}.txt").write_text(HEADER.format(what=what) + "".join(blocks.values()), encoding="utf-8")


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
