"""The command `package`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from repvgg_deploy.cli.command import Command, Outcome, option_group, show_progress
from repvgg_deploy.cli.options import PATH, output_options, path_argument

if TYPE_CHECKING:
    from repvgg_deploy.workflows.package import PackageResult


@click.command(
    cls=Command,
    examples=(
        "repvgg-deploy package net.fp16.plan -o models/ --triton",
        "repvgg-deploy package t4/net.plan l4/net.plan -o models/ --triton --name net --instances 2",
        "repvgg-deploy package net.int8.onnx -o models/ --triton --device cpu --data photos/",
    ),
)
@path_argument("models", nargs=-1, required=True, metavar="MODEL...")
@option_group(
    "Input",
    click.option(
        "--data",
        type=PATH,
        metavar="DIR",
        help="Images to compare the preprocessing on.  [default: synthetic images]",
    ),
)
@option_group(
    "Backend",
    click.option(
        "--max-batch",
        type=click.IntRange(min=1),
        metavar="N",
        help="Largest batch of collected requests.  [default: the plan's, or 32]",
    ),
    click.option(
        "--queue-delay",
        type=click.IntRange(min=0),
        default=100,
        metavar="US",
        help="Microseconds that a request may wait for others.",
    ),
    click.option(
        "--instances", type=click.IntRange(min=1), default=1, metavar="N", help="Copies of the model per device."
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "gpu"]),
        help="Where the server runs the model.  [default: gpu for a plan, cpu for an INT8 graph, else auto]",
    ),
    click.option("--warm-up/--no-warm-up", default=True, help="Run each batch size before the model is ready."),
    click.option("--cuda-graphs/--no-cuda-graphs", default=True, help="CUDA graphs of a plan's kernels."),
)
@option_group(
    "Output",
    click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Model repository to write to."),
    click.option("--triton", is_flag=True, required=True, help="An entry for Triton Inference Server."),
    click.option("--name", metavar="NAME", help="Name of the entry.  [default: after the first file]"),
    click.option(
        "--preprocess/--no-preprocess",
        default=True,
        help="Also the preprocessing as a graph, and an ensemble that takes images of any size.",
    ),
)
@output_options
def package(models: tuple[Path, ...], output: Path, name: str | None, data: Path | None, **options: Any) -> Any:
    """Write an entry of a model repository for Triton Inference Server.

    MODEL is an ONNX graph or a TensorRT plan that `export` wrote; several plans of one graph, each for another GPU,
    become one entry. A second call with the same name adds a version.
    """
    from repvgg_deploy.workflows.package import PackageRequest, ServingOptions
    from repvgg_deploy.workflows.package import package as write_package

    serving = ServingOptions(
        options["max_batch"],
        options["queue_delay"],
        options["instances"],
        options["device"],
        options["warm_up"],
        options["cuda_graphs"],
    )
    request = PackageRequest(models, output, name, serving, options["preprocess"], data)
    with show_progress() as progress:
        result = write_package(request, progress)
    return Outcome(result.to_dict(), lambda: _show(result))


def _show(result: PackageResult) -> None:
    from repvgg_deploy.cli.tables import print_fields

    parity = result.preprocessing
    print_fields(
        {
            "repository": result.repository,
            "entries": ", ".join(result.entries),
            "version": result.entry_version,
            "run by": f"{result.backend}, {result.precision}",
            "largest batch": result.max_batch or None,
            "preprocessing": None
            if parity is None
            else f"{parity.equal:.2f} % of Pillow's values on {parity.pictures} images, "
            f"others within {parity.max_levels:g}/255",
            "golden outputs": "yes" if result.golden else "no",
        }
    )
