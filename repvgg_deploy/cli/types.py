"""The types that options parse to, and the names that a shell completes."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from repvgg_deploy.errors import DeployError

if TYPE_CHECKING:
    SizeType = click.ParamType[tuple[int, int]]
    ChannelsType = click.ParamType[tuple[float, ...]]
    NameType = click.ParamType[str]
    ListType = click.ParamType[tuple[Any, ...]]
else:
    # Older releases of click have no generic ParamType.
    SizeType = ChannelsType = NameType = ListType = click.ParamType

_LARGEST = 8192


class FilePath(click.Path):
    """A path that the system can look up, whether there is something or not."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`value` as a path.

        Raises:
            DeployError: it is too long, has a NUL character, or leads through a folder that may not be entered.
        """
        try:
            os.stat(value)  # noqa: PTH116 (a value that is no path yet)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            # A link to itself is nothing that can be read; whoever replaces it with a file does not follow it.
            if getattr(error, "errno", None) != errno.ELOOP:
                reason = getattr(error, "strerror", None) or str(error)
                raise DeployError(
                    f"the path {value} cannot be used: {reason}", "check it, and its permissions"
                ) from error
        return super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """A number within limits; `nan` and `inf` are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse `value`, or fail as wrong usage."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Size(SizeType):
    """`224`, or `HxW` as in `192x256`, as (height, width)."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `value`, or fail as wrong usage."""
        if isinstance(value, tuple | list):
            value = "x".join(map(str, value))
        match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", str(value))
        if match is None or not all(0 < int(size) <= _LARGEST for size in match.groups() if size is not None):
            self.fail(f"{value!r} is not a size; give pixels, such as 224 or 192x256, up to {_LARGEST}", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class Channels(ChannelsType):
    """One number per channel, separated by commas or spaces, as `0.485,0.456,0.406`."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse `value`, or fail as wrong usage."""
        if isinstance(value, tuple | list):
            value = ",".join(map(str, value))
        try:
            numbers = tuple(float(part) for part in re.split(r"[,\s]+", str(value).strip()))
        except ValueError:
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not one number per channel, such as 0.485,0.456,0.406", param, ctx)
        return numbers


class Strides(ListType):
    """One whole number per stage, separated by commas or spaces, as `1,1,2,2,2`."""

    name = "S,S,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse `value`, or fail as wrong usage."""
        text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value).strip()
        if re.fullmatch(r"[1-9]\d?([,\s]+[1-9]\d?)*", text) is None:
            self.fail(f"{value!r} is not a list of strides, such as 1,1,2,2,2", param, ctx)
        return tuple(int(number) for number in re.findall(r"\d+", text))


STAGES = r"(stage)?\d+(,(stage)?\d+)*"


class Stages(ListType):
    """Numbers of stages, separated by commas, as `2,3,4`; `pooled` is none of them."""

    name = "STAGES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse `value`, or fail as wrong usage."""
        text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value).lower()
        if text in ("pooled", "true", ""):
            return ()
        if re.fullmatch(STAGES, text) is None:
            self.fail(f"{value!r} is not a list of stages, such as 2,3,4", param, ctx)
        return tuple(int(number) for number in re.findall(r"\d+", text))


class Name(NameType):
    """One of a list of names; the list is made when it is needed, and a typing error gets suggestions.

    Args:
        what: what the names are called in errors: "architecture".
        names: all of them.
        find: the name that a user means, for those with several spellings; raises DeployError if there is none.
        accepts: what is taken besides the names, such as the path of a file.
    """

    def __init__(
        self,
        what: str,
        names: Callable[[], Sequence[str]],
        find: Callable[[str], object] | None = None,
        accepts: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.name = what
        self._names = names
        self._find = find
        self._accepts = accepts

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """`value` as it is, or fail as wrong usage."""
        text = str(value)
        if self._accepts(text) or text in self._names():
            return text
        if self._find is None or not _finds(self._find, text):
            self.fail(f"no {self.name} is called {text!r}. {suggest(text, self._names())}", param, ctx)
        return text

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so, in any case."""
        return [CompletionItem(name) for name in self._names() if name.lower().startswith(incomplete.lower())]


class ListOf(ListType):
    """Values of another type, separated by commas: `1,8`."""

    def __init__(self, item: click.ParamType[Any] | Any) -> None:
        self.item = item
        self.name = item.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Parse each part of `value`, or fail as wrong usage."""
        parts = value if isinstance(value, tuple | list) else [part.strip() for part in str(value).split(",")]
        return tuple(self.item.convert(part, param, ctx) for part in parts)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """What completes the last part."""
        before, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        return [CompletionItem(f"{before}{comma}{item.value}") for item in found]


def suggest(wrong: str, names: Sequence[str]) -> str:
    """`Did you mean …?` with the names that look like `wrong`, or else all of them."""
    plain = {name.lower(): name for name in names}
    near = [plain[match] for match in difflib.get_close_matches(wrong.lower(), plain, n=3, cutoff=0.5)]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(names)}."


def _arch_names() -> list[str]:
    from repvgg_deploy.nets.cards import arch_names

    return arch_names()


def _baseline_names() -> list[str]:
    from repvgg_deploy.nets.cards import baseline_names

    return baseline_names()


def _recipe_names() -> list[str]:
    from repvgg_deploy.files.places import data_folder

    return sorted(path.stem for path in data_folder("calibration").glob("*.toml"))


def _find_arch(name: str) -> object:
    from repvgg_deploy.nets.cards import find_card

    return find_card(name)


def _activation_names() -> Sequence[str]:
    from repvgg_deploy.nets.activations import NAMES

    return NAMES


def _find_activation(name: str) -> object:
    from repvgg_deploy.nets.activations import parse_activation

    return parse_activation(name)


def _find_baseline(name: str) -> object:
    from repvgg_deploy.nets.cards import require_baseline

    return require_baseline(name)


def _backend_names() -> Sequence[str]:
    from repvgg_deploy.benchmark.names import BACKENDS

    return BACKENDS


def _precision_names() -> Sequence[str]:
    from repvgg_deploy.benchmark.names import PRECISIONS

    return PRECISIONS


def _finds(find: Callable[[str], object], text: str) -> bool:
    try:
        find(text)
    except DeployError:
        return False
    return True


def is_model_name(text: str) -> bool:
    """Whether `bench` can run a net of that name: an architecture, or a baseline."""
    return _finds(_find_arch, text) or text in _baseline_names() or _finds(_find_baseline, text)


def suggest_model(text: str) -> str:
    """The architectures and baselines that look like `text`, or else all of them."""
    return suggest(text, [*_arch_names(), *_baseline_names()])


def _is_recipe_file(text: str) -> bool:
    return Path(text).suffix == ".toml"


ARCH = Name("architecture", _arch_names, _find_arch)
ACTIVATION = Name("activation", _activation_names, _find_activation)
BASELINE = Name("baseline", _baseline_names, _find_baseline)
RECIPE = Name("recipe", _recipe_names, accepts=_is_recipe_file)
BACKEND = Name("backend", _backend_names)
PRECISION = Name("precision", _precision_names)
