"""The command line: options in, one call, output out."""

from __future__ import annotations

import click

from repvgg_deploy import __version__
from repvgg_deploy.cli.bench import bench
from repvgg_deploy.cli.command import Group
from repvgg_deploy.cli.export import export, fuse, refit
from repvgg_deploy.cli.machine import demo, doctor
from repvgg_deploy.cli.models import archs, eval_, inspect, verify
from repvgg_deploy.cli.package import package
from repvgg_deploy.cli.predict import predict
from repvgg_deploy.cli.pull import pull
from repvgg_deploy.cli.qat import qat
from repvgg_deploy.cli.report import report

_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "show_default": True,
    "auto_envvar_prefix": "REPVGG_DEPLOY",
}


@click.group(cls=Group, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="repvgg-deploy")
def main() -> None:
    """Deployment compiler for RepVGG image classifiers.

    A checkpoint of any library goes in; a verified, simplified ONNX graph and a TensorRT engine come out.

    Every option of a command can be set in the environment, as REPVGG_DEPLOY_EXPORT_CALIB for `export --calib`.
    """


for _command in (
    archs,
    bench,
    demo,
    doctor,
    eval_,
    export,
    fuse,
    inspect,
    package,
    predict,
    pull,
    qat,
    refit,
    report,
    verify,
):
    main.add_command(_command)
