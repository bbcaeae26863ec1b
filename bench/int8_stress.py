"""INT8 on nets with planted faults: how far each recipe falls below the same recipe on the net as it was.

    python bench/int8_stress.py --checkpoint CKPT --calib DIR --val DIR -o bench/results

Every case is held against its own float32 net on the same images. The files run in ONNX Runtime.
`int8_plants.py` has the faults.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product

from int8_plants import CASES, USUAL_CASES
from int8_setup import (
    add_data_options,
    compare,
    load_fused,
    read_calibration,
    read_validation,
    run_ours,
    run_torch,
    write_record,
)

from repvgg_deploy.quantize.codes import Target


def main() -> None:
    """Quantize every planted net with every recipe; print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_options(parser)
    parser.add_argument("--every", type=int, default=1, help="evaluate every n-th image")
    parser.add_argument("--recipes", nargs="+", default=["fast", "accurate"])
    parser.add_argument(
        "--targets", type=Target, nargs="+", default=[Target.PORTABLE], metavar="TARGET", help="as --qdq"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=USUAL_CASES, metavar="CASE", help="by their names")
    parser.add_argument("--name", default="tinyimagenet", help="of the net, for the record")
    arguments = parser.parse_args()
    original = load_fused(arguments.checkpoint)
    calibration = read_calibration(arguments.calib, arguments.count)
    images, labels = read_validation(arguments.val)
    images, labels = images[:: arguments.every], labels[:: arguments.every]
    results = []
    for name in arguments.cases:
        net = CASES[name](original, calibration)
        exact = run_torch(net, images)
        for recipe, target in product(arguments.recipes, arguments.targets):
            logits, _ = run_ours(net, recipe, calibration, images, target)
            for runs_on, values in logits.items():
                figures = compare(values, exact, labels)
                results.append({"case": name, "recipe": recipe, "runs_on": runs_on, **asdict(figures)})
                print(results[-1], flush=True)
    path = write_record(arguments.output, f"int8-stress-{arguments.name}", results)
    print(f"written {path}")


if __name__ == "__main__":
    main()
