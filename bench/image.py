"""Build an image, try it as a user that it does not know, and record what it is.

    TORCH_INDEX=<PyTorch's CPU wheel index> python bench/image.py cpu -o bench/results/image-cpu.json
    python bench/image.py gpu --no-demo -o bench/results/image-gpu.json

Takes docker, podman or buildah as `docker/build.sh` does, and its settings from the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SBOM = "/usr/local/lib/repvgg-deploy/sbom.cdx.json"
USER = "12345:12345"
"""One that no image knows."""

_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Image:
    """A built image and the program that built it."""

    engine: str
    tag: str

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it as `USER`, with `folder` at /work."""
        options = ["--user", USER, "-v", f"{folder}:/work"]
        if self.engine == "buildah":
            # An image cannot be run by it, only a container that was made of one before.
            container = _output(["buildah", "from", self.tag]).strip()
            try:
                return _call(["buildah", "run", *options, "--workingdir", "/work", container, "--", *command])
            finally:
                _call(["buildah", "rm", container])
        return _call([self.engine, "run", "--rm", *options, "--entrypoint", command[0], self.tag, *command[1:]])

    def describe(self) -> dict[str, Any]:
        """Its size in bytes, its layers, and its configuration."""
        if self.engine == "buildah":
            (listed,) = json.loads(_output(["buildah", "images", "--json", self.tag]))
            number, unit = re.fullmatch(r"([\d.]+) ?(\w+)", listed["size"]).groups()  # type: ignore[union-attr]
            known = json.loads(_output(["buildah", "inspect", "--type", "image", self.tag]))["Docker"]
            size, layers, config = round(float(number) * _UNITS[unit]), known["rootfs"]["diff_ids"], known["config"]
        else:
            (known,) = json.loads(_output([self.engine, "image", "inspect", self.tag]))
            size, layers, config = known["Size"], known["RootFS"]["Layers"], known["Config"]
        kept = {name: config.get(name) for name in ("User", "Entrypoint", "Cmd", "WorkingDir", "Labels", "Healthcheck")}
        return {"bytes": size, "layers": len(layers), "config": kept}

    def read_components(self, folder: Path) -> list[str]:
        """Name and version of each package in its bill of materials."""
        bill = json.loads(self.run(folder, "cat", SBOM).stdout)
        return sorted(f"{component['name']} {component['version']}" for component in bill["components"])


def find_engine() -> str | None:
    """The program that `docker/build.sh` takes; None if none works here."""
    for name in os.environ.get("ENGINE", "docker podman buildah").split():
        try:
            if _call([name, "--version" if name == "buildah" else "info"]).returncode == 0:
                return name
        except FileNotFoundError:
            continue
    return None


def has_base(engine: str, target: str) -> bool:
    """Whether the image that a target is built on is there, or can be had."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    name = f"{target.upper()}_BASE"
    base = os.environ.get(name) or re.findall(rf"^ARG {name}=(\S+)", text, flags=re.M)[0]
    look = ["inspect", "--type", "image"] if engine == "buildah" else ["image", "inspect"]
    return any(_call([engine, *words, base]).returncode == 0 for words in (look, ["pull"]))


def build(engine: str, target: str) -> tuple[Image, float]:
    """The image of a target, and how long its build took in seconds.

    Raises:
        RuntimeError: it cannot be built; with the end of what the build printed.
    """
    tag = os.environ.get("TAG", f"repvgg-deploy:{target}")
    start = time.monotonic()
    done = _call([str(ROOT / "docker" / "build.sh"), target], ENGINE=engine, TAG=tag)
    if done.returncode != 0:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-20:]))
    return Image(engine, tag), time.monotonic() - start


def record(image: Image, seconds: float, with_demo: bool) -> dict[str, Any]:
    """What is known of the image, and what `doctor` and `demo` print in it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        doctor = image.run(folder, "repvgg-deploy", "doctor", "--json")
        demo = image.run(folder, "repvgg-deploy", "demo", "--quiet") if with_demo else None
        components = image.read_components(folder)
    names = ("CPU_BASE", "GPU_BASE", "EXTRAS")
    found: dict[str, Any] = {
        "image": image.tag,
        "date": time.strftime("%Y-%m-%d"),
        "built_with": _output([image.engine, "--version"]).strip(),
        "settings": {key: os.environ[key] for key in names if os.environ.get(key)},
        "build_s": round(seconds),
        **image.describe(),
        "user": USER,
        "doctor": json.loads(doctor.stdout),
        "sbom_components": components,
    }
    if demo is not None:
        said = {"exit_status": demo.returncode, "stdout": demo.stdout.splitlines(), "stderr": demo.stderr.splitlines()}
        found["demo"] = said
    return found


def _call(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Build, record, and return 1 if the demo failed."""
    parser = argparse.ArgumentParser(description="Build an image and record what it is.")
    parser.add_argument("target", choices=("cpu", "gpu"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--no-demo", action="store_true", help="for an image whose base has no TensorRT")
    options = parser.parse_args()
    engine = find_engine()
    if engine is None:
        print("error: docker, podman or buildah is needed", file=sys.stderr)
        return 1
    image, seconds = build(engine, options.target)
    found = record(image, seconds, not options.no_demo)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(found.get("demo", {}).get("exit_status", 0))


if __name__ == "__main__":
    sys.exit(main())
