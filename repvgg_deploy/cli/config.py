"""Options in a file: `--config FILE` reads them, `--save-config FILE` writes those that were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from repvgg_deploy.cli.command import option_group
from repvgg_deploy.cli.types import FilePath, Name, suggest
from repvgg_deploy.errors import DeployError
from repvgg_deploy.files.staging import stage_files

F = TypeVar("F", bound=Callable[..., Any])

_OF_ONE_VALUE = (
    click.types.StringParamType, click.types.IntParamType, click.types.FloatParamType, click.Choice, click.Path,
    click.IntRange, click.FloatRange, Name,
)  # fmt: skip
# A file of options may come from anywhere; what runs code has to be typed.
_NAMES_CODE = ("module", "kwargs")
# What a file is about itself, and what every run decides anew.
_NOT_SAVED = ("config", "save_config", "from", "as_json", "quiet", "verbose", "help")


def config_options(command: F) -> F:
    """`--config` and `--save-config`, of a command whose options may stand in a file."""
    return option_group(
        "Input",
        click.option("--config", type=FilePath(), metavar="FILE", is_eager=True, expose_value=False,
                     callback=_read_config, help="TOML file of options; options on the command line take precedence."),
        click.option("--save-config", type=FilePath(), metavar="FILE", expose_value=False,
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
    from repvgg_deploy.files.typed_values import parse_toml, read_file

    name = f"--config {path}"
    try:
        values = parse_toml(read_file(path, name, ""), name, "")
    except FileNotFoundError as error:
        raise click.UsageError(f"cannot read {name}: {error.strerror}", ctx) from error
    except DeployError as error:
        raise click.UsageError(error.message, ctx) from error
    # A file may serve several commands, each with a table of its name.
    own = values.get(str(ctx.info_name), values)
    if not isinstance(own, Mapping):
        raise click.UsageError(f"{name}: {ctx.info_name} is a value, not a table.", ctx)
    set_defaults(ctx, own, name)


def set_defaults(ctx: click.Context, values: Mapping[str, Any], source: str) -> None:
    """Make `values`, by the names of options, the defaults of the command that is about to be parsed.

    Raises:
        click.UsageError: there is no such option; `source` says where it stands.
    """
    options = _options(ctx)
    known = {_key(option): name for name, option in options.items()}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        plain = key.replace("_", "-")
        if plain not in known:
            raise click.UsageError(f"{source} has an unknown option {key!r}. {suggest(plain, list(known))}", ctx)
        name = known[plain]
        option = options[name]
        if name in _NAMES_CODE:
            raise click.UsageError(f"{source}: {key} names code, so it is taken from the command line only.", ctx)
        wrong = _find_fault(option, value)
        if wrong is not None:
            raise click.UsageError(f"{source}: {key} {wrong}.", ctx)
        # As typed: each type parses text, and not every one tells a number from a name.
        plain_value = _as_typed(value)
        defaults[name] = [plain_value] if option.multiple and not isinstance(value, list) else plain_value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _find_fault(option: click.Option, value: Any) -> str | None:
    """What is wrong with the kind of a value from a file, if anything; its range is for the option's type to say."""
    if isinstance(value, Mapping):
        return "is a table, not a value"
    if isinstance(option.type, click.types.BoolParamType):
        return None if isinstance(value, bool) else "is true or false"
    if isinstance(value, bool):
        return "is a value, not true or false"
    if not isinstance(value, list):
        return None
    of_one_value = isinstance(option.type, _OF_ONE_VALUE)
    if of_one_value and not option.multiple and option.nargs == 1:
        return "is one value, not a list"
    # Of an option that may be repeated, each may be a list if its type reads one.
    nested = option.multiple and not of_one_value
    items = [item for part in value for item in (part if nested and isinstance(part, list) else [part])]
    return "is a list of values" if any(isinstance(item, bool | list | Mapping) for item in items) else None


def _as_typed(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_typed(item) for item in value]
    return value if isinstance(value, bool) else str(value)


def given_options(ctx: click.Context) -> dict[str, Any]:
    """The options that have another value than their default, by name, as `set_defaults` takes them."""
    return {
        _key(option): _plain(ctx.params[name])
        for name, option in _options(ctx).items()
        if name in ctx.params
        and name not in _NAMES_CODE
        and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _save_config(ctx: click.Context, _option: click.Parameter, path: Path | None) -> None:
    """Write the options of this command once all of them are parsed."""
    if path is None or ctx.resilient_parsing:
        return

    def write() -> None:
        from repvgg_deploy.files.typed_values import to_toml

        text = to_toml({str(ctx.info_name): given_options(ctx)})
        try:
            with stage_files(path.absolute().parent, is_result=False) as staging:
                (staging / path.name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except (DeployError, ValueError) as error:
            raise click.UsageError(f"--save-config {path} cannot be written: {error}", ctx) from error

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
