"""Ctrl-C and SIGTERM at random moments: does the command end at once, with its status, and leave nothing?

    python bench/signals.py CKPT --images DIR --tries 300 -o signals.json

Each try runs one command, waits for a random part of the time that it takes, and sends SIGINT or SIGTERM. It has failed
unless the status is 130 or 143, stderr ends with `Aborted!`, and no file, folder or temporary file is left; or, if
everything was in its place already, unless the status is 0 and the files are those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.interrupt import interrupt  # type: ignore[import-not-found]


def commands(checkpoint: str, images: str, out: str) -> dict[str, list[str]]:
    """The commands that are interrupted, by name."""
    export = ["export", checkpoint, "-o", out]
    return {
        "export fp32": [*export, "--engine", "none"],
        "export int8": [*export, "--engine", "none", "--int8", "--calib", images, "--recipe", "fast"],
        "export engine": [*export, "--engine", "tensorrt-rtx"],
        "bench": ["bench", checkpoint, "--backend", "onnxruntime-cpu", "--duration", "0.5"],
        "eval": ["eval", checkpoint, "--data", images],
    }


def run_tries(name: str, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Interrupt one command `--tries` times; its row of the table."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as base:
        seconds, results = _undisturbed(name, arguments, Path(base) / "whole")
        faults, statuses, slowest = [], dict[int, int](), 0.0
        for number in range(arguments.tries):
            folder = Path(base) / str(number)
            delay = draw.uniform(0.0, seconds)
            command = commands(str(arguments.checkpoint), str(arguments.images), str(folder / "out"))[name]
            ended = interrupt(command, folder, draw.choice((signal.SIGINT, signal.SIGTERM)), delay)
            fault = ended.fault(results)
            if fault is not None:
                faults.append({"signal": ended.number.name, "delay_s": round(delay, 3), "fault": fault})
                print(f"{name}: {faults[-1]}", file=sys.stderr)
            statuses[ended.status] = statuses.get(ended.status, 0) + 1
            slowest = max(slowest, ended.seconds_to_end)
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "command": name, "tries": arguments.tries, "clean": arguments.tries - len(faults), "faults": faults,
        "statuses": statuses, "seconds_undisturbed": round(seconds, 2), "slowest_end_s": round(slowest, 2),
    }  # fmt: skip


def _undisturbed(name: str, arguments: argparse.Namespace, folder: Path) -> tuple[float, Sequence[str]]:
    """How long the command takes, and the files that it writes."""
    command = commands(str(arguments.checkpoint), str(arguments.images), str(folder / "out"))[name]
    start = time.monotonic()
    # SIGCONT changes nothing.
    ended = interrupt(command, folder, signal.SIGCONT, 0.0)
    if ended.status != 0:
        sys.exit(f"{name} fails by itself: {ended.stderr}")
    return time.monotonic() - start, ended.left


def main() -> None:
    """Run the tries and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="labeled images, for INT8 and eval")
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--only", action="append", help="a command of the table; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    names = arguments.only or list(commands("", "", ""))
    rows = [run_tries(name, arguments, arguments.seed + index) for index, name in enumerate(names)]
    print(f"{'command':15} {'clean':>9} {'130':>5} {'143':>5} {'0':>5} {'slowest end':>12}")
    for row in rows:
        counts = " ".join(f"{row['statuses'].get(status, 0):5}" for status in (130, 143, 0))
        print(f"{row['command']:15} {row['clean']:4}/{row['tries']:<4} {counts} {row['slowest_end_s']:10.2f} s")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
