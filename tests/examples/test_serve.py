"""The serving example: its client speaks Triton's protocol, its manifests are what KServe and Compose read."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pictures import noise
from helpers.small_nets import make_net, name_in_layout
from helpers.triton_server import Repository, serve_grpc, serve_http
from PIL import Image

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.images.decoding import DecodingOptions
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.serving import PredictOptions, Predictor
from repvgg_deploy.workflows.export import export
from repvgg_deploy.workflows.export_request import ExportRequest, GraphRequest
from repvgg_deploy.workflows.package import PackageRequest, package

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve"
ROOT = EXAMPLE.parents[1]
MANIFESTS = sorted(EXAMPLE.rglob("*.yaml"))
SERVERS = {"http": serve_http, "grpc": serve_grpc}
NAMES = tuple(f"class {index}" for index in range(5))


@pytest.fixture(scope="module")
def client() -> ModuleType:
    spec = importlib.util.spec_from_file_location("client", EXAMPLE / "client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    torch.save(name_in_layout(make_net(), "official"), folder / "net.pth")
    size, named = PreprocessingOptions(size=(32, 32)), GraphRequest(class_names=NAMES)
    request = ExportRequest(folder / "net.pth", folder, preprocessing=size, graph=named, engine="none")
    return export(request).onnx


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, path in enumerate(paths):
        # The orientation says that the camera was turned by a quarter.
        image = Image.fromarray(noise(64, 90 + 30 * number))
        exif = image.getexif()
        exif[0x0112] = 1 if number else 6
        image.save(path, quality=95, exif=exif)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_client_prints_the_classes_of_predict(
    protocol: str,
    client: ModuleType,
    graph: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(f"tritonclient.{protocol}", reason="tritonclient is not installed")
    package(PackageRequest((graph,), tmp_path / "models", "net"))
    repository = Repository(tmp_path / "models")
    serve: Callable[[Repository], AbstractContextManager[str]] = SERVERS[protocol]
    (tmp_path / "notes.jpg").write_text("no image")
    with serve(repository) as url:
        asked = ["--url", url, "--topk", "2", *(["--grpc"] if protocol == "grpc" else [])]
        status = client.main([*asked, *map(str, [*photos, tmp_path / "notes.jpg"])])
        with pytest.raises(SystemExit, match="no model other"):
            client.main([*asked, "--model", "other", str(photos[0])])
    with pytest.raises(SystemExit, match="does not answer"):
        client.main([*asked, str(photos[0])])
    captured = capsys.readouterr()
    assert (status, "notes.jpg: cannot identify" in captured.err) == (1, True)
    assert sorted(repository.requests) == [(64, 120, 3), (64, 150, 3), (90, 64, 3)]
    predict = Predictor(
        open_model(graph), PredictOptions(topk=2, output="logits", decoding=DecodingOptions(decoder="pillow"))
    )
    lines = captured.out.splitlines()
    assert len(lines) == len(photos)
    for line, expected in zip(lines, predict([str(photo) for photo in photos]), strict=True):
        path, _, answer = line.partition("\t")
        assert path == expected.path
        found = [re.fullmatch(r"(class \d) (-?[\d.]+)", part) for part in answer.split(", ")]
        assert [match[1] for match in found if match] == list(expected.names or ())
        logits = np.array(expected.logits)
        scores = [float(match[2]) for match in found if match]
        assert np.allclose(scores, np.sort(logits)[::-1][:2], atol=0.02 * np.abs(logits).max())


def read_yaml(path: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_classes(package_name: str, folder: str) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Of each model of a client library, the types of its fields and their names in JSON; nothing of it is imported."""
    found = importlib.util.find_spec(package_name)
    if found is None or found.origin is None:
        pytest.skip(f"{package_name} is not installed")
    classes = {}
    for path in (Path(found.origin).parent / folder).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                fields = {
                    statement.targets[0].id: ast.literal_eval(statement.value)
                    for statement in node.body
                    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
                    and statement.targets[0].id in ("openapi_types", "attribute_map")
                }  # fmt: skip
                if len(fields) == 2:
                    classes[node.name] = (fields["openapi_types"], fields["attribute_map"])
    return classes


def check_fields(value: Any, kind: str, classes: dict[str, Any], where: str) -> int:
    """How many fields were looked up; fails at one that the schema does not have, or of another type."""
    if kind in classes:
        types, names = classes[kind]
        by_name = {json_name: types[name] for name, json_name in names.items()}
        assert isinstance(value, dict), where
        assert set(value) <= set(by_name), where
        return sum(1 + check_fields(v, by_name[k], classes, f"{where}.{k}") for k, v in value.items())
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        return sum(check_fields(item, inner[1], classes, where) for item in value)
    if inner := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return sum(check_fields(item, inner[1], classes, where) for item in value.values())
    expected = {"str": str, "int": int, "bool": bool, "float": (int, float)}.get(kind, object)
    assert isinstance(value, expected), f"{where} is no {kind}"
    return 0


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_manifest_has_only_fields_of_kserve_s_schema(name: str) -> None:
    manifest = read_yaml(EXAMPLE / "kserve" / f"{name}.yaml")
    classes = read_classes("kubernetes", "client/models") | read_classes("kserve", "models")
    assert check_fields(manifest, "V1beta1InferenceService", classes, name) >= 17
    wrong = {**manifest, "spec": {"predictor": {"model": {"storageURI": "pvc://models"}}}}
    with pytest.raises(AssertionError, match="storageURI"):
        check_fields(wrong, "V1beta1InferenceService", classes, name)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_manifest_serves_what_package_writes(name: str) -> None:
    manifest = read_yaml(EXAMPLE / "kserve" / f"{name}.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = manifest["spec"]["predictor"]["model"]
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert model["modelFormat"]["name"] == {"cpu": "onnx", "gpu": "tensorrt"}[name]
    assert ("nvidia.com/gpu" in model["resources"]["limits"]) == (name == "gpu")


def test_compose_runs_package_and_a_server_of_its_repository() -> None:
    services = read_yaml(EXAMPLE / "docker-compose.yaml")["services"]
    more = read_yaml(EXAMPLE / "docker-compose.gpu.yaml")["services"]
    assert set(services) == {"package", "triton"} >= set(more)
    for service in (services["package"], more["package"]):
        command = service["command"]
        assert command[0] == "package"
        assert command[command.index("-o") + 1] == "models"
    assert services["triton"]["volumes"] == ["./models:/models:ro"]
    assert "--model-repository=/models" in services["triton"]["command"]
    assert more["triton"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_one_release_of_nvidia_s_images_everywhere() -> None:
    """A plan runs in the TensorRT that built it."""
    texts = [path.read_text(encoding="utf-8") for path in [*MANIFESTS, ROOT / "Dockerfile"]]
    releases = {release for text in texts for release in re.findall(r"\d\d\.\d\d(?=-py3)", text)}
    assert len(releases) == 1
