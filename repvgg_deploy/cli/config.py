"""Options in a file: `--config FILE` reads them, `--save-config FILE` writes those that were given."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from repvgg_deploy.cli.command import option_group
from repvgg_deploy.cli.types import suggest

F = TypeVar("F", bound=Callable[..., Any])

# What a file is about itself, and what every run decides anew.
_NOT_SAVED = ("config", "save_config", "as_json", "quiet", "verbose", "help")


def config_options(command: F) -> F:
    """`--config` and `--save-config`, of a command whose options may stand in a file."""
    return option_group(
        "Input",
        click.option("--config", type=click.Path(path_type=Path), metavar="FILE", is_eager=True, expose_value=False,
                     callback=_read_config, help="TOML file of options; options on the command line take precedence."),
        click.option("--save-config", type=click.Path(path_type=Path), metavar="FILE", expose_value=False,
                     callback=_save_config, help="TOML file to write the given options to, for --config."),
    )(command)  # fmt: skip


def _options(ctx: click.Context) -> dict[str, click.Option]:
    return {
        parameter.name: parameter
        for parameter in ctx.command.params
        if isinstance(parameter, click.Option) and parameter.name is not None and parameter.name not in _NOT_SAVED
    }


def _read_config(ctx: click.Context, _option: click.Parameter, path: Path | None) -> None:
    """Make the values of the file the defaults of the command that is about to be parsed."""
    if path is None or ctx.resilient_parsing:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(f"--config {path} cannot be read: {error}", ctx) from error
    # A file may serve several commands, each with a table of its name.
    own = values.get(str(ctx.info_name), values)
    options = _options(ctx)
    known = {_key(option): name for name, option in options.items()}
    defaults: dict[str, Any] = {}
    for key, value in own.items():
        plain = key.replace("_", "-")
        if plain not in known:
            raise click.UsageError(f"--config {path} has an unknown option {key!r}. {suggest(plain, list(known))}", ctx)
        if isinstance(value, Mapping):
            raise click.UsageError(f"--config {path}: {key} is a table, not a value.", ctx)
        name = known[plain]
        defaults[name] = [value] if options[name].multiple and not isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _save_config(ctx: click.Context, _option: click.Parameter, path: Path | None) -> None:
    """Write the options of this command once all of them are parsed."""
    if path is None or ctx.resilient_parsing:
        return

    def write() -> None:
        given = {
            _key(option): _plain(ctx.params[name])
            for name, option in _options(ctx).items()
            if name in ctx.params and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        lines = [f"[{ctx.info_name}]", *(f"{key} = {_to_toml(value)}" for key, value in given.items())]
        try:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise click.UsageError(f"--save-config {path} cannot be written: {error.strerror}", ctx) from error

    # Callbacks run in the order of the options, before those that follow have their values.
    ctx.meta["repvgg_deploy.before_run"] = write


def _key(option: click.Option) -> str:
    """The name of an option in a file: its longest one, without the dashes."""
    return max(option.opts, key=len).lstrip("-")


def _plain(value: Any) -> Any:
    """A parsed value as TOML can hold it, and as the option would parse it again."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float) else str(value)


def _to_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_to_toml, value))}]"
    # The strings of JSON are strings of TOML, but for one control character that nobody types.
    return json.dumps(value, ensure_ascii=False)
