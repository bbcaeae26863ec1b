"""A module made by the user's own code, with the weights of a checkpoint: what `export --module` exports."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg_deploy.checkpoints.containers import Contents, read_contents
from repvgg_deploy.checkpoints.sources import open_source
from repvgg_deploy.checkpoints.stored import StoredTensor
from repvgg_deploy.errors import CheckpointError, DeployError

_WRAPPERS = ("state_dict", "model", "model_ema", "ema_state_dict", "ema", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def make_module(factory: str, kwargs: str | None, checkpoint: Path) -> nn.Module:
    """Call `package.module:factory` with the keywords of a JSON object, and load the weights of `checkpoint`.

    This runs the code of that module, which is looked for in the working folder too. The checkpoint's own code is never
    run: it holds tensors only.

    Raises:
        DeployError: there is no such factory, it fails, or it does not return a torch module.
        CheckpointError: the file cannot be read, or its tensors do not belong to the module.
    """
    name, _, attribute = factory.partition(":")
    if not attribute:
        raise DeployError(
            f"--module {factory} is not of the form package.module:factory", "give the factory's full name"
        )
    arguments = _parse_kwargs(kwargs)
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        make = getattr(importlib.import_module(name), attribute)
        module = make(**arguments)
    except Exception as error:
        # The code is the user's own, so it can raise any exception.
        raise DeployError(
            f"{factory} did not return a module: {type(error).__name__}: {error}",
            "package.module:factory, importable from here; --kwargs takes its keywords as JSON",
        ) from error
    if not isinstance(module, nn.Module):
        raise DeployError(
            f"{factory} returned a {type(module).__name__}, not a module", "the factory returns a torch.nn.Module"
        )
    _load(module, checkpoint)
    return module.eval()


def _parse_kwargs(text: str | None) -> dict[str, Any]:
    try:
        values = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise DeployError(f"--kwargs is not JSON: {error}", """--kwargs '{"classes": 19}'""") from error
    if not isinstance(values, dict):
        raise DeployError("--kwargs is not a JSON object", """--kwargs '{"classes": 19}'""")
    return values


def _load(module: nn.Module, path: Path) -> None:
    wanted = module.state_dict()
    with open_source(path) as source:
        stored = _strip(_choose(read_contents(source, path), path), wanted)
        missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        if missing or unknown:
            raise CheckpointError(
                f"{path} does not fit {type(module).__name__}: {len(missing)} tensors are missing"
                f" ({', '.join(missing[:3])}), {len(unknown)} do not belong to the module ({', '.join(unknown[:3])})",
                "give the factory the keywords that the net was trained with: --kwargs",
            )
        for name, tensor in stored.items():
            # Before it is read: a file can claim any shape.
            if tensor.shape != tuple(wanted[name].shape):
                raise CheckpointError(
                    f"{path} does not fit {type(module).__name__}: {name} is {tensor.shape!s:.60},"
                    f" not {tuple(wanted[name].shape)}",
                    "check --kwargs",
                )
        module.load_state_dict({name: torch.from_numpy(tensor.load(name)) for name, tensor in stored.items()})


def _choose(contents: Contents, path: Path) -> Mapping[str, StoredTensor]:
    """The first dict of tensors in a file, which may be wrapped as trainers do, by their names there."""
    place = ""
    while not any(where == place for where in contents.places.values()):
        inside = f"{place}." if place else ""
        places = contents.places.values()
        key = next((w for w in _WRAPPERS if any(f"{where}.".startswith(f"{inside}{w}.") for where in places)), None)
        if key is None:
            raise CheckpointError(f"{path} does not contain a state dict", "torch.save(net.state_dict(), 'net.pth')")
        place = f"{inside}{key}"
    start = len(place) + 1 if place else 0
    return {name[start:]: tensor for name, tensor in contents.tensors.items() if contents.places[name] == place}


def _strip(tensors: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> Mapping[str, StoredTensor]:
    """The tensors under the module's own names, without the prefix of a wrapper that all of them have."""
    # Wrappers may be nested: `module._orig_mod.`.
    while not tensors.keys() & wanted.keys():
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
