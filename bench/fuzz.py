"""Hostile input: mutated files of every format that is read, each given to a command that is watched.

    python bench/fuzz.py run --cases 20000 --seed 1 --seconds 1400
    python bench/fuzz.py run --kind own --cases 600
    python bench/fuzz.py record
    python bench/fuzz.py record --kind own
    python bench/fuzz.py case 4711 --seed 1 --keep DIR

`run` goes on where it was stopped; `record` writes what it found so far to bench/results; `case` repeats one.
OMP_NUM_THREADS=1 is needed: each case is a process forked from this one.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
from fuzzing.campaign import FORMATS, Kind, keep_failure, read_log, run_campaign, run_cases, summarize, warm_up
from fuzzing.child import CPU_SECONDS, MEMORY

_LIBRARIES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "numpy",
    "pillow",
    "safetensors",
    "msgspec",
    "protobuf",
    "click",
)

LOG = click.option("--log", type=click.Path(path_type=Path),
                   help="Rows of the cases.  [default: build/fuzz.jsonl, build/fuzz-own.jsonl]")  # fmt: skip
KIND = click.option("--kind", type=click.Choice(list(FORMATS)), default="foreign", show_default=True,
                    help="Files from elsewhere, or those that the package itself leaves and reads again.")  # fmt: skip
SEED = click.option("--seed", type=int, default=1, show_default=True, help="What the cases are drawn from.")


def _default_log(kind: Kind) -> Path:
    return Path(f"build/fuzz{'-own' if kind == 'own' else ''}.jsonl")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Mutated files of every format that is read, each given to a command that is watched."""


@main.command()
@click.option("--cases", type=click.IntRange(min=1), default=20_000, show_default=True, help="How many in all.")
@click.option("--seconds", type=float, default=float("inf"), help="When to stop and leave the rest to the next run.")
@SEED
@KIND
@LOG
def run(cases: int, seconds: float, seed: int, kind: Kind, log: Path | None) -> None:
    """Run the cases that the log lacks; exit 1 if one of all failed."""
    log = log or _default_log(kind)
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder))
    done = run_campaign(kind, seed, cases, log, seconds)
    rows = read_log(log)
    reasons = Counter((row["format"], row["reason"]) for row in rows if row["outcome"] == "failed")
    click.echo(f"{done} of {cases} cases: {dict(Counter(row['outcome'] for row in rows))}")
    for (form, reason), count in reasons.most_common(60):
        click.echo(f"{count:5}  {form}: {reason}")
    sys.stdout.flush()
    # The end of the interpreter would tell at length what the module of onnxsim leaves behind.
    os._exit(bool(reasons))


@main.command()
@click.argument("number", type=int)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for its files and what was printed.")
@SEED
@KIND
def case(number: int, keep: Path | None, seed: int, kind: Kind) -> None:
    """Run one case and print what became of it."""
    with tempfile.TemporaryDirectory() as folder:
        warm_up(Path(folder) / "whole")
        (outcome,) = run_cases(kind, seed, [number], Path(folder))
    click.echo(json.dumps(outcome.to_row(), indent=1))
    click.echo(outcome.result.crash + outcome.result.stderr[-2000:])
    if keep is not None:
        keep_failure(outcome, keep)


@main.command()
@SEED
@KIND
@LOG
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
def record(seed: int, kind: Kind, log: Path | None, output: Path) -> None:
    """Write the record of a log."""
    from repvgg_deploy.hardware.cpu import read_cpu

    rows = read_log(log or _default_log(kind))
    values = {
        "kind": "fuzz",
        "files": kind,
        "seed": seed,
        "machine": {"cpu": read_cpu().model, "cores": os.cpu_count(), "system": platform.system()},
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "limits": {"cpu_s": CPU_SECONDS, "memory_bytes": MEMORY},
        "date": datetime.date.today().isoformat(),
        **summarize(rows),
    }
    path = output / f"fuzz-{'own-' if kind == 'own' else ''}{len(rows)}-cases-{values['date']}.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    click.echo(path)


if __name__ == "__main__":
    main()
