"""Which net of a file is taken: the only one, the plain weights before an EMA copy, or the one that was requested."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from repvgg_deploy.checkpoints.architecture import infer_spec
from repvgg_deploy.checkpoints.containers import Contents
from repvgg_deploy.checkpoints.heads import HEAD_WORDS
from repvgg_deploy.checkpoints.inert import Inert, attributes_of
from repvgg_deploy.checkpoints.known_layouts import LAYOUTS
from repvgg_deploy.checkpoints.matching import FoundNet, find_nets
from repvgg_deploy.checkpoints.other_nets import recognize_net
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.errors import CheckpointError
from repvgg_deploy.files.printable import printable
from repvgg_deploy.nets.cards import describe

_EMA = re.compile(r"(?:^|[._])(?:model_)?ema(?:[._]|$)|^averaged_model|_ema$|^ema")


@dataclass(frozen=True)
class Choice:
    """The net to take, whether it is an EMA copy, all tensors and modules of its place by their names there, notes."""

    net: FoundNet
    is_ema: bool
    tensors: Mapping[str, StoredTensor]
    modules: Mapping[str, Inert]
    notes: tuple[str, ...]


def choose_net(contents: Contents, path: Path, ema: bool | None, wanted: str | None) -> Choice:
    """The net of a file that `ema` and `wanted`, the beginning of its names, ask for.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    nets = find_nets(contents.places)
    sizes = Counter(contents.places.values())
    found = [net for net in nets if _is_repvgg(net, contents, sizes)]
    shown = printable(str(path))
    if not found:
        raise _not_a_repvgg(shown, contents)
    found = _without_fragments(_without_twins(found, contents))
    if wanted is not None:
        found = _select(found, wanted, contents, shown)
    plain, averaged = _split(found, contents)
    if ema and not averaged:
        raise CheckpointError(f"{shown} has no EMA copy of the weights", "leave --ema out")
    if ema is False and not plain:
        raise CheckpointError(f"{shown} contains only an EMA copy of the weights", "leave --no-ema out")
    main = averaged if ema is None and _is_swapped(contents) else []
    pool = main or (averaged if ema or not plain else plain)
    if len(pool) > 1:
        raise CheckpointError(
            f"{shown} contains {len(pool)} nets: {_list(pool, contents)}",
            f"choose one, as in --net {_shown_prefix(pool[0])}",
        )
    notes = _ema_notes(ema, bool(plain), bool(averaged), bool(main))
    foreign = {net.full_name(key) for net in nets if net.prefix != pool[0].prefix for key in net.keys.names}
    net, places = _with_head(pool[0], contents)
    start = len(net.place) + 1 if net.place else 0
    modules = {name[start:]: module for name, module in contents.modules.items() if name.startswith(net.place)}
    return Choice(net, pool[0] in averaged, _tensors_of(net, places, contents, foreign), modules, notes)


def _with_head(net: FoundNet, contents: Contents) -> tuple[FoundNet, set[str]]:
    """The net and the places of its tensors; in the place around, where a head has a dict of its own beside the net's.

    Where a dict is called `head` or `classifier`, and the net's own has no linear layer.
    """
    own = {net.full_name(key) for key in net.keys.names}
    places = {contents.places[name] for name in own}
    if len(places) > 1:
        # Dicts in dicts instead of dots in names.
        inside = f"{net.place}." if net.place else ""
        return net, {place for place in contents.places.values() if f"{place}.".startswith(inside)}
    around, _, last = net.place.rpartition(".")
    beside = {
        place
        for place in contents.places.values()
        if place.rpartition(".")[0] == around and place not in places and HEAD_WORDS.search(place.rpartition(".")[2])
    }
    matrices = [n for n, t in contents.tensors.items() if contents.places[n] in places and n not in own and t.ndim == 2]
    if not net.place or len(beside) != 1 or matrices:
        return net, places
    names = {f"{last}.{key}": canonical for key, canonical in net.keys.names.items()}
    keys = replace(net.keys, names=names, prefix=f"{last}.{net.keys.prefix}")
    return FoundNet(net.prefix, around, keys), places | beside


def _tensors_of(net: FoundNet, places: set[str], contents: Contents, foreign: set[str]) -> dict[str, StoredTensor]:
    """The tensors in these places, without the blocks of other nets, by their names in the net's place."""
    start = len(net.place) + 1 if net.place else 0
    own = {net.full_name(key) for key in net.keys.names}
    return {
        name[start:]: tensor
        for name, tensor in contents.tensors.items()
        if name in own or (contents.places[name] in places and name not in foreign)
    }


def _is_repvgg(net: FoundNet, contents: Contents, sizes: Mapping[str, int]) -> bool:
    """Whether the stem is there; or most of the rest, so that the stem can be said to be missing.

    `sizes` are the numbers of tensors in each place.
    """
    names = net.keys.names
    if any(name.startswith("stages.0.0.") for name in names.values()):
        return True
    place = contents.places[net.full_name(next(iter(names)))]
    return 2 * len(names) > sizes[place]


def _without_twins(nets: list[FoundNet], contents: Contents) -> list[FoundNet]:
    """The nets, without those that are the very tensors of one before: a compiled net is saved under both names."""
    kept: dict[tuple[object, ...], FoundNet] = {}
    for net in nets:
        keys = sorted(net.keys.names)
        identity = tuple((net.keys.names[key], contents.tensors[net.full_name(key)].identity) for key in keys)
        other = kept.get(identity)
        if other is None or len(net.prefix) < len(other.prefix):
            kept[identity] = net
    return list(kept.values())


def _without_fragments(nets: list[FoundNet]) -> list[FoundNet]:
    """The nets that have their BNs' statistics, where some have: optimizers keep tensors under the same names."""
    trained = [net for net in nets if _has_statistics(net)]
    return trained or nets


def _has_statistics(net: FoundNet) -> bool:
    names = net.keys.names.values()
    return any(name.endswith(("running_var", ".conv.bias")) for name in names)


def _select(nets: list[FoundNet], wanted: str, contents: Contents, shown: str) -> list[FoundNet]:
    word = wanted.strip(".")
    exact = [net for net in nets if net.prefix == word]
    inside = [net for net in nets if f".{net.prefix}.".find(f".{word}.") >= 0] if word else []
    if not exact and not inside:
        raise CheckpointError(
            f"{shown} contains no net under {printable(wanted)}", f"it contains: {_list(nets, contents)}"
        )
    return exact or inside


def _split(nets: list[FoundNet], contents: Contents) -> tuple[list[FoundNet], list[FoundNet]]:
    """The plain nets, and the EMA copies."""
    swapped = _is_swapped(contents)
    plain: list[FoundNet] = []
    averaged: list[FoundNet] = []
    for net in nets:
        if swapped and net.prefix.split(".")[0] in ("state_dict", "ema_state_dict"):
            is_ema = net.prefix.split(".")[0] == "state_dict"
        else:
            is_ema = any(_EMA.search(word) for word in net.prefix.split("."))
        (averaged if is_ema else plain).append(net)
    return plain, averaged


def _is_swapped(contents: Contents) -> bool:
    """Whether the file is one of mmengine's EMAHook: `state_dict` is what is averaged and deployed.

    https://github.com/open-mmlab/mmengine/blob/main/mmengine/hooks/ema_hook.py
    """
    has_copy = any(place.split(".")[0] == "ema_state_dict" for place in contents.places.values())
    return has_copy and "mmengine_version" in attributes_of(contents.configuration.get("meta"))


def _ema_notes(ema: bool | None, plain: bool, averaged: bool, main: bool) -> tuple[str, ...]:
    if main and plain:
        return ("the weights are an EMA copy; --no-ema selects those that were averaged",)
    if ema is None and plain and averaged:
        return ("the file also has an EMA copy; --ema selects it",)
    if ema is None and not plain:
        return ("the file has only an EMA copy, which was used",)
    return ()


def _list(nets: list[FoundNet], contents: Contents) -> str:
    described = []
    for net in nets[:8]:
        tensors = {key: contents.tensors[net.full_name(key)] for key in net.keys.names}
        try:
            what = describe(infer_spec(net.keys, tensors))
        except CheckpointError:
            what = "incomplete"
        described.append(f"{_shown_prefix(net)} ({what})")
    return ", ".join(described) + (", …" if len(nets) > 8 else "")


def _shown_prefix(net: FoundNet) -> str:
    return printable(net.prefix) or "''"


def _not_a_repvgg(shown: str, contents: Contents) -> CheckpointError:
    # As in the state dict, whatever is around it.
    keys = [name[len(contents.places[name]) :].lstrip(".") for name in contents.tensors]
    keys = [key for key in keys if "." in key]
    if not keys:
        return CheckpointError(f"{shown} contains no named tensors", "save the model's state_dict()")
    known = recognize_net(keys)
    looks = f"it looks like {known}" if known else f"its first tensors are {', '.join(map(printable, keys[:3]))}"
    names = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    return CheckpointError(f"{shown} is not a RepVGG checkpoint: {looks}", f"known layouts: {names}")
