"""What travels to the actors of a cluster."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from repvgg_deploy.images.archives import TarMember
from repvgg_deploy.images.decoding import DecodingOptions
from repvgg_deploy.images.sources import Unreadable
from repvgg_deploy.serving import PredictOptions, PredictorSpec
from repvgg_deploy.serving.ray_cluster import (
    PredictorActor,
    RayOptions,
    _decode_source,
    _part_size,
    _within_cores,
    encode_sources,
)

pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def test_sources_arrive_as_they_were_sent() -> None:
    odd = Path(os.fsdecode(b'/data/\xff,\n".jpg'))
    sources = [Path("a.png"), odd, TarMember(odd, os.fsdecode(b"m\xfe.jpg"), 512, 7), Unreadable(Path("x"), "closed")]
    table = encode_sources(sources, 10)
    assert table["index"].to_pylist() == [10, 11, 12, 13]
    assert [_decode_source(row) for row in table.to_pylist()] == sources


@pytest.mark.parametrize(("images", "batch", "actors"), [(1, 64, 1), (100, 64, 3), (50_000, 64, 8), (10**7, 50, 2)])
def test_parts_are_whole_batches_enough_for_all_actors(images: int, batch: int, actors: int) -> None:
    size = _part_size(images, batch, actors)
    assert size % batch == 0
    assert size <= 4096 + batch
    assert images <= batch * 4 * actors or -(-images // size) >= 2 * actors


@pytest.mark.slow
def test_actor_predicts_what_a_predictor_does(checkpoint_file: Path, image_folder: Path) -> None:
    spec = PredictorSpec(checkpoint_file, options=PredictOptions(topk=2))
    sources = sorted(image_folder.rglob("*.*"))
    actor = PredictorActor(pickle.loads(pickle.dumps(spec)))
    table = actor(encode_sources(sources, 3))
    expected = spec.open()(sources)
    assert table["index"].to_pylist() == list(range(3, 18))
    assert table["path"].to_pylist() == [row.path for row in expected]
    assert [tuple(row) for row in table["classes"].to_pylist()] == [row.classes for row in expected]


@pytest.mark.parametrize(("cpus", "cores"), [(0, 1), (0.5, 1), (4, 4)])
def test_an_actor_has_threads_for_its_own_cores(cpus: float, cores: int) -> None:
    spec = _within_cores(PredictorSpec(Path("net.onnx")), RayOptions(cpus=cpus))
    assert (spec.threads, spec.options.decoding.workers) == (cores, cores)
    wanted = PredictorSpec(Path("net.onnx"), threads=7, options=PredictOptions(decoding=DecodingOptions(workers=9)))
    assert _within_cores(wanted, RayOptions(cpus=cpus)) == wanted


def test_features_and_errors_are_columns_of_their_own(checkpoint_file: Path, tmp_path: Path) -> None:
    spec = PredictorSpec(checkpoint_file, options=PredictOptions(output="logits"))
    table = PredictorActor(replace(spec))(encode_sources([tmp_path / "gone.png"]))
    (row,) = table.to_pylist()
    assert row["error"] == f"there is no image {tmp_path}/gone.png"
    assert row["classes"] is None
