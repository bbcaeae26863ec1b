"""The check by onnxsim without a process of its own."""

from __future__ import annotations

import pytest
from onnx import ModelProto

from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs import simplification


def check_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `SimplificationCheck` call onnxsim itself; the verdict, and the error that tells of it, are the same."""

    def start(check: simplification.SimplificationCheck) -> None:
        vars(check)["difference"] = "it ended without a result"

    def submit(check: simplification.SimplificationCheck, model: ModelProto) -> None:
        vars(check)["difference"] = simplification.find_simplification(model)

    def require(check: simplification.SimplificationCheck) -> None:
        difference = vars(check)["difference"]
        if difference is not None:
            raise GraphError(f"the graph could not be checked by onnxsim: {difference}", "pip install onnxsim")

    replaced = {"__init__": start, "__exit__": lambda *_: None, "submit": submit, "require": require}
    for name, method in replaced.items():
        monkeypatch.setattr(simplification.SimplificationCheck, name, method)
