"""INT8 measured: accuracy beside other tools and over draws, planted faults, other nets, mixed precision, speed, time.

    python bench/int8.py --help
    python bench/int8.py peers --checkpoint CKPT --calib DIR --val DIR -o bench/results

Each command prints its rows as they are measured and writes one record.
"""

from __future__ import annotations

import click
from int8_bench import draws, mixed, nets, peers, speed, stress, timing

COMMANDS = (
    peers.peers,
    draws.draws,
    stress.stress,
    stress.faults,
    nets.nets,
    mixed.mixed,
    speed.speed,
    timing.time_quantizing,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """INT8 measured; every command writes a record into --output."""


for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
