"""`predict` and `eval` on a real Ray cluster of two nodes, with a worker killed, against one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.pictures import jpeg, write_tar

from repvgg_deploy.artifacts import PreprocessingOptions
from repvgg_deploy.errors import DeployError
from repvgg_deploy.runtime.model import open_model
from repvgg_deploy.serving import PredictOptions, PredictorSpec
from repvgg_deploy.serving.ray_cluster import RayOptions
from repvgg_deploy.workflows.evaluate import evaluate
from repvgg_deploy.workflows.on_ray import RayEvaluationRequest, evaluate_on_ray, predict_on_ray
from repvgg_deploy.workflows.predict import PredictRequest, predict

pytestmark = pytest.mark.exhaustive
parquet: Any = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
SMALL = PreprocessingOptions(size=(32, 32))
CLUSTER = RayOptions(actors=2, cpus=1)


@pytest.fixture(scope="module")
def second_node() -> Iterator[Any]:
    """The second node of a cluster that this process is connected to."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    utils = pytest.importorskip("ray.cluster_utils")
    pytest.importorskip("ray.data", reason="Ray Data is not installed")
    memory = {"object_store_memory": 80 << 20}
    cluster = utils.Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False, **memory})
    try:
        node = cluster.add_node(num_cpus=1, **memory)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield node
    finally:
        ray.shutdown()
        cluster.shutdown()


def actors_of(node: Any) -> list[int]:
    """The processes of predictors on a node."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            command = (place / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == raylet and b"PredictorActor" in command:
            found.append(int(place.name))
    return found


def kill_an_actor(node: Any, output: Path, killed: list[int]) -> None:
    """Kill a predictor on `node` once the first part of the output is there."""
    partial = output.with_name(f"{output.name}.partial")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not killed:
        if any(partial.glob("*.parquet")):
            for process in actors_of(node)[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore")
def test_predictions_of_a_cluster_that_loses_a_worker_are_those_of_one_process(
    second_node: Any, checkpoint_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(600):
        (many / f"{number:03}.png").symlink_to(image_folder / f"class{number % 5}" / "0.png")
    (many / "300.png").unlink()
    (many / "300.png").write_bytes(b"no image")
    write_tar(many / "more.tar", {f"{number}.jpg": jpeg(number) for number in range(20)})
    spec = PredictorSpec(checkpoint_file, SMALL, options=PredictOptions(topk=2, batch=4))
    request = PredictRequest(spec, (str(many),), tmp_path / "rows")
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_actor, args=(second_node, request.output, killed))
    killer.start()
    summary = predict_on_ray(request, CLUSTER)
    killer.join()
    assert killed, "the work was over before a worker could be killed"
    assert (summary.images, summary.broken, summary.backend) == (620, 1, "torch-cpu on ray")
    parts = sorted(request.output.iterdir())
    assert [part.name for part in parts] == [f"part-{number:05}.parquet" for number in range(len(parts))]
    rows = [row for part in parts for row in parquet.read_table(part).to_pylist()]
    expected = list(predict(open_model(checkpoint_file, SMALL), many, spec.options))
    assert [row["path"] for row in rows] == [prediction.path for prediction in expected]
    for row, prediction in zip(rows, expected, strict=True):
        assert row["error"] == prediction.error
        assert tuple(row["classes"] or ()) == prediction.classes
        assert (row["scores"] or []) == pytest.approx(prediction.scores, rel=1e-4)
    with pytest.raises(DeployError, match="already exists"):
        predict_on_ray(request, CLUSTER)


@pytest.mark.filterwarnings("ignore")
def test_accuracy_on_a_cluster_is_that_of_one_process(
    second_node: Any, checkpoint_file: Path, image_folder: Path
) -> None:
    assert second_node is not None
    (image_folder / "class2" / "bad.jpg").write_bytes(b"no image")
    spec = PredictorSpec(checkpoint_file, SMALL, options=PredictOptions(batch=4))
    found = evaluate_on_ray(RayEvaluationRequest(spec, image_folder), CLUSTER)
    here = evaluate(open_model(checkpoint_file, SMALL), image_folder)
    assert (found.top1, found.top5, found.images, found.broken) == (here.top1, here.top5, here.images, here.broken)
    missing = replace(spec, model=image_folder / "none.onnx")
    with pytest.raises(DeployError, match=r"none\.onnx"):
        evaluate_on_ray(RayEvaluationRequest(missing, image_folder), CLUSTER)
