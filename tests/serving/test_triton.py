"""`config.pbtxt` is what Triton's own protobuf reads, and says what it was given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from repvgg_deploy.errors import DeployError
from repvgg_deploy.serving.triton import ServedEnsemble, ServedModel, ServedTensor, make_labels

IMAGES = ServedTensor("images", "float16", (-1, 3, 64, 48))
LOGITS = ServedTensor("logits", "float32", (-1, 10), has_labels=True)
PLAN = ServedModel(
    "net", "tensorrt", (IMAGES,), (LOGITS,), 64, (16, 64), 250, 2, "gpu", {"8.9": "b.plan", "7.5": "a.plan"},
    cuda_graphs=True,
)  # fmt: skip
PIXELS = ServedTensor("pixels", "uint8", (-1, -1, 3))
FIRST = ServedModel("net_first", "onnxruntime", (PIXELS,), (replace(IMAGES, shape=(1, 3, 64, 48)),), device="cpu")


def parse(text: str) -> Any:
    """The text as Triton reads it."""
    module = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format

    return text_format.Parse(text, module.ModelConfig())


def test_a_plan_s_config_says_everything() -> None:
    config = parse(PLAN.to_pbtxt())
    assert (config.name, config.backend, config.max_batch_size) == ("net", "tensorrt", 64)
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("images", 10, [3, 64, 48])]
    assert [(t.name, list(t.dims), t.label_filename) for t in config.output] == [("logits", [10], "labels.txt")]
    assert dict(config.cc_model_filenames) == {"7.5": "a.plan", "8.9": "b.plan"}
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_GPU")
    assert config.optimization.cuda.graphs
    assert [warm.batch_size for warm in config.model_warmup] == [1, 16, 64]
    assert list(config.model_warmup[0].inputs["images"].dims) == [3, 64, 48]


def test_a_model_without_batching_has_whole_shapes_and_a_warm_up_of_some_size() -> None:
    config = parse(FIRST.to_pbtxt())
    assert (config.max_batch_size, config.default_model_filename) == (0, "model.onnx")
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, -1, 3]
    (warm,) = config.model_warmup
    assert (warm.batch_size, list(warm.inputs["pixels"].dims)) == (1, [512, 512, 3])


def test_an_ensemble_hands_the_first_model_s_output_to_the_second() -> None:
    config = parse(ServedEnsemble("net_images", FIRST, PLAN).to_pbtxt())
    first, second = config.ensemble_scheduling.step
    assert [first.model_name, second.model_name] == ["net_first", "net"]
    assert dict(first.input_map) == {"pixels": config.input[0].name}
    assert dict(first.output_map) == dict(second.input_map) == {"images": "images"}
    assert dict(second.output_map) == {"logits": config.output[0].name}
    assert list(config.output[0].dims) == [1, 10]


def test_the_head_is_how_the_file_begins_and_names_are_quoted() -> None:
    assert PLAN.to_pbtxt().startswith(PLAN.head())
    assert replace(PLAN, instances=3).head() == PLAN.head()
    assert replace(PLAN, max_batch=32).head() != PLAN.head()
    assert 'name: "a\\"b"' in replace(PLAN, name='a"b').head()


def test_a_type_that_no_model_has_is_refused() -> None:
    with pytest.raises(DeployError, match="bfloat16"):
        replace(PLAN, inputs=(replace(IMAGES, dtype="bfloat16"),)).to_pbtxt()


def test_labels_are_one_per_line_whatever_is_in_a_name() -> None:
    assert make_labels(["a\nb", " c  d"]) == "a b\nc d\n"
