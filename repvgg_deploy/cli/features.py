"""`--features`, an option that may stand alone or have a value."""

from __future__ import annotations

import re

import click

from repvgg_deploy.cli.command import Command
from repvgg_deploy.cli.types import STAGES


class FeaturesCommand(Command):
    """A command whose `--features` takes what follows as its value only if that is a list of stages."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write the value beside the option, then parse as usual."""
        joined: list[str] = []
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            if arg == "--features":
                arg += "=" + (rest.pop(0) if rest and re.fullmatch(STAGES, rest[0]) else "pooled")
            joined.append(arg)
        return super().parse_args(ctx, joined)
