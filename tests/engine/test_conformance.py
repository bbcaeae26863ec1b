"""Every name of the TensorRT modules that the adapter uses exists in each of the three libraries.

The lists of names were read from the installed bindings of tensorrt 10.16.1, tensorrt 11.4 and tensorrt_rtx 1.7.1;
the adapter's uses are read from its source, so that nothing needs a GPU or the libraries.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import repvgg_deploy.engine
from repvgg_deploy.engine.backends import OPTIONAL

LISTS = Path(__file__).resolve().parents[3] / "shared" / "tensorrt_api"
SOURCES = sorted(Path(repvgg_deploy.engine.__file__).parent.glob("*.py"))

# What the module is called where it is used, and the classes of the objects: by expression, in a file or function.
MODULE = {"trt", "module", "backend.module", "loaded.backend.module", "self._loaded.backend.module", "self._trt"}
OBJECTS = {
    "network": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "_refused/error": "ParserError",
        "_tensor/tensor": "ITensor",
        "precision_of/tensor": "ITensor",
        "layer": "ILayer",
        "producer": "ILayer",
    },
    "building": {
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "parsed.builder": "Builder",
    },
    "timing_cache": {"config": "IBuilderConfig", "cache": "ITimingCache"},
    "loading": {"runtime": "Runtime", "engine": "ICudaEngine"},
    "context": {"context": "IExecutionContext", "loaded.engine": "ICudaEngine"},
    "context_settings": {"config": "IRuntimeConfig", "cache": "IRuntimeCache", "self._engine": "ICudaEngine"},
    "stream": {
        "context": "IExecutionContext",
        "self.context": "IExecutionContext",
        "prepared.context": "IExecutionContext",
        "loaded.engine": "ICudaEngine",
    },
    "runner": {"context": "IExecutionContext"},
    "inspection": {"inspector": "EngineInspector", "loaded.engine": "ICudaEngine"},
    "refit": {
        "refitter": "Refitter",
        "parser": "OnnxParserRefitter",
        "parser.get_error(i)": "ParserError",
        "config": "ISerializationConfig",
        "loaded.engine": "ICudaEngine",
    },
}
# Names that would be the library's anywhere else, and are this package's own here.
OURS = {
    ("building", "cache"),
    ("refit", "engine"),
    ("loading", "self.engine"),
}
LIBRARY_NAMES = {"builder", "network", "parser", "config", "context", "engine", "refitter", "inspector", "cache"}


def uses(source: Path) -> Iterator[str]:
    """`Class`, `Class.attribute` of the library, as one file of the adapter uses them."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    yield from _uses_in(tree, source.stem, {}, "")


def _uses_in(scope: ast.AST, stem: str, aliases: dict[str, str], function: str) -> Iterator[str]:
    aliases = dict(aliases)
    for node in ast.iter_child_nodes(scope):
        inner = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            path = resolve(node.value, stem, aliases, function)
            if path is not None:
                aliases[node.targets[0].id] = path
        if isinstance(node, ast.Attribute):
            path = resolve(node, stem, aliases, function)
            if path:
                yield path
        yield from _uses_in(node, stem, aliases, inner)


def resolve(node: ast.AST, stem: str, aliases: dict[str, str], function: str) -> str | None:
    """The library's name of an expression: empty for the module itself, None for what is not the library's."""
    text = ast.unparse(node)
    if text in MODULE:
        return ""
    objects = OBJECTS.get(stem, {})
    for key in (f"{function}/{text}", text):
        if key in objects:
            return objects[key]
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        base = resolve(node.value, stem, aliases, function)
        return None if base is None else f"{base}.{node.attr}".lstrip(".")
    return None


@cache
def used_names() -> frozenset[str]:
    # Of longer paths the first two parts are the library's; names with underscores on both sides are Python's.
    found = {".".join(path.split(".")[:2]) for source in SOURCES for path in uses(source)}
    return frozenset(name for name in found if "__" not in name)


@cache
def read_lists() -> dict[str, dict[str, list[str]]]:
    files = sorted(LISTS.glob("*.json"))
    if not files:
        pytest.skip("../shared/tensorrt_api with the name lists is not here")
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def exists(path: str, names: dict[str, list[str]]) -> bool:
    owner, _, attribute = path.partition(".")
    return owner in names and (not attribute or attribute in names[owner])


def test_the_collector_sees_the_adapters_calls() -> None:
    expected = {
        "Builder.build_serialized_network_to_stream",
        "BuilderFlag.STRIP_PLAN",
        "IBuilderConfig.set_timing_cache",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "ICudaEngine.create_execution_context",
        "ICudaEngine.device_memory_size_v2",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.set_device_memory",
        "IRuntimeCache.deserialize",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IExecutionContext.execute_async_v3",
        "IProgressMonitor",
        "LayerType.DEQUANTIZE",
        "OnnxParserRefitter.refit_from_file",
        "ParserError.node_operator",
        "Runtime.deserialize_cuda_engine",
        "TensorIOMode.OUTPUT",
    }
    assert expected <= used_names()
    assert len(used_names()) > 60


def test_no_object_of_the_library_escapes_the_collector() -> None:
    escaped = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node.value)
                known = OBJECTS.get(source.stem, {})
                if text.split(".")[-1] in LIBRARY_NAMES and text not in known and (source.stem, text) not in OURS:
                    escaped.add((source.stem, text, node.attr))
    assert not escaped


def test_every_name_exists_in_all_three_libraries() -> None:
    common = used_names() - OPTIONAL - {name for name in used_names() if name.split(".")[0] in OPTIONAL}
    missing = {(library, name) for library, names in read_lists().items() for name in common if not exists(name, names)}
    assert not missing


def test_what_only_some_releases_have_is_behind_the_one_capability_check() -> None:
    lists = read_lists()
    # TensorRT 10.13 lacks INCLUDE_REFIT; every list is of a later release.
    for name in OPTIONAL - {"SerializationFlag.INCLUDE_REFIT"}:
        having = [library for library, names in lists.items() if exists(name, names)]
        assert 0 < len(having) < len(lists), name
    text = "\n".join(source.read_text(encoding="utf-8") for source in SOURCES)
    for name in OPTIONAL:
        assert f'"{name}")' in text, f"{name} is never asked for"


def test_a_misspelt_name_would_be_found() -> None:
    assert not any(exists("IBuilderConfig.set_timing_cash", names) for names in read_lists().values())
    assert not any(exists("NoSuchClass", names) for names in read_lists().values())
