"""From pixels of any size to the input of a net, as an ONNX graph: resized as Pillow does, cropped, normalized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

import repvgg_deploy
from repvgg_deploy.artifacts import Preprocessing
from repvgg_deploy.errors import GraphError
from repvgg_deploy.graphs.builder import GraphBuilder, OnnxGraph, make_graph
from repvgg_deploy.images.decoding import scale_and_shift

# Opset 18 is the first with `antialias`, which is Pillow's way of making images smaller.
_OPSET = 18
# Beyond this aspect ratio the ends of an image are cut off first: they are far outside the crop, and a strip of one
# pixel would take gigabytes.
_LONG = 16
# The coefficient of Pillow's bicubic filter; ONNX has -0.75 by default.
_PILLOW_CUBIC = -0.5
_MODES = {"bilinear": "linear", "bicubic": "cubic"}
_HINT = "prepare the images in the client, and leave the graph out: --no-preprocess"

PIXELS = "pixels"
"""The name of the input: uint8 (height, width, 3), RGB."""


@dataclass(frozen=True)
class NetInput:
    """What the net takes: the tensor's name, its type in NumPy's words, and whether it is NHWC pixels."""

    name: str
    dtype: str
    takes_pixels: bool = False


def make_preprocessing(preprocessing: Preprocessing, net_input: NetInput) -> OnnxGraph:
    """The graph that takes one RGB image of any size, and gives the net's input for it, of batch 1.

    Resizing is done on bytes, as in Pillow; the same float32 scale and shift as elsewhere normalize.

    Raises:
        GraphError: ONNX cannot do what `preprocessing` says.
    """
    _require_supported(preprocessing)
    builder = GraphBuilder()
    image = _cut_strip(builder, preprocessing.resize)
    mode = _MODES[preprocessing.interpolation]
    resized = builder.add(
        "Resize",
        [image, "", "", "resized_size"],
        "resized",
        mode=mode,
        antialias=1,
        axes=[2, 3],
        coordinate_transformation_mode="half_pixel",
        # At the edges the weights of the pixels that are there add up to one, with the linear filter too.
        exclude_outside=1,
        **({"cubic_coeff_a": _PILLOW_CUBIC} if mode == "cubic" else {}),
    )
    cropped = _crop(builder, resized, (preprocessing.height, preprocessing.width))
    if preprocessing.color_order == "bgr":
        cropped = builder.add("Gather", [cropped, builder.weight("order", np.array([2, 1, 0]))], "bgr", axis=1)
    _finish(builder, cropped, preprocessing, net_input)
    size = [preprocessing.height, preprocessing.width]
    shape = [1, *size, 3] if net_input.takes_pixels else [1, 3, *size]
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(net_input.dtype))
    return make_graph(
        builder,
        [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info(net_input.name, dtype, shape)],
        _OPSET,
        {"repvgg_deploy.preprocessing": preprocessing.to_json()},
        ("repvgg-deploy", repvgg_deploy.__version__),
    )


def _require_supported(preprocessing: Preprocessing) -> None:
    if preprocessing.interpolation not in _MODES:
        raise GraphError(f"ONNX has no {preprocessing.interpolation} filter as Pillow's to resize images with", _HINT)
    if len(preprocessing.mean) != 3:
        raise GraphError(f"the net takes {len(preprocessing.mean)} channels, and the graph prepares RGB images", _HINT)
    if preprocessing.resize < max(preprocessing.height, preprocessing.width):
        raise GraphError(
            f"a crop of {preprocessing.height}x{preprocessing.width} is larger than "
            f"the shorter side of {preprocessing.resize}, and the graph does not pad",
            _HINT,
        )


def _cut_strip(builder: GraphBuilder, resize: int) -> str:
    """The image (1, 3, H, W) with the ends of a strip cut off alike, and `resized_size`, what it is resized to."""
    add, weight = builder.add, builder.weight
    size = add("Shape", [PIXELS], "size", start=0, end=2)
    short = add("ReduceMin", [size], "short", keepdims=1)
    longest = add("Mul", [short, weight("aspect", np.array([_LONG]))], "longest")
    over = add("Sub", [size, longest], "over")
    excess = add("Max", [over, weight("zero", np.array([0]))], "excess")
    begin = add("Div", [excess, weight("two", np.array([2]))], "strip_begin")
    end = add("Sub", [size, begin], "strip_end")
    image = add("Slice", [PIXELS, begin, end, weight("hwc", np.array([0, 1]))], "strip")
    kept = add("Sub", [end, begin], "kept")
    # Whole numbers: rounded down, as torchvision does.
    scaled = add("Mul", [kept, weight("resize", np.array([resize]))], "scaled")
    add("Div", [scaled, short], "resized_size")
    planes = add("Transpose", [image], "planes", perm=[2, 0, 1])
    # Not Unsqueeze, through which ONNX Runtime moves the transposition behind Resize, where `axes` do not hold.
    shape = add("Concat", [weight("one_image", np.array([1, 3])), kept], "batch_shape", axis=0)
    return add("Reshape", [planes, shape], "batch")


def _crop(builder: GraphBuilder, image: str, size: tuple[int, int]) -> str:
    """The centre of `image`; Round takes halves to even, as Python and so torchvision do."""
    add, weight = builder.add, builder.weight
    crop = weight("crop", np.array(size))
    margin = add("Cast", [add("Sub", ["resized_size", crop], "margin")], "margin_float", to=TensorProto.FLOAT)
    half = add("Round", [add("Mul", [margin, weight("half", np.array([0.5], np.float32))], "half_margin")], "offset")
    begin = add("Cast", [half], "crop_begin", to=TensorProto.INT64)
    end = add("Add", [begin, crop], "crop_end")
    return add("Slice", [image, begin, end, weight("nchw", np.array([2, 3]))], "cropped")


def _finish(builder: GraphBuilder, image: str, preprocessing: Preprocessing, net_input: NetInput) -> None:
    if net_input.takes_pixels:
        builder.add("Transpose", [image], net_input.name, perm=[0, 2, 3, 1])
        return
    scale, shift = (values.reshape(1, 3, 1, 1) for values in scale_and_shift(preprocessing))
    floats = builder.add("Cast", [image], "floats", to=TensorProto.FLOAT)
    product = builder.add("Mul", [floats, builder.weight("scale", scale)], "product")
    is_half = net_input.dtype == "float16"
    values = builder.add(
        "Add", [product, builder.weight("shift", shift)], "normalized_values" if is_half else net_input.name
    )
    if is_half:
        builder.add("Cast", [values], net_input.name, to=TensorProto.FLOAT16)
