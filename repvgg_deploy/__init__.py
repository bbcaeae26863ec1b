"""repvgg-deploy: from a RepVGG checkpoint to a verified ONNX graph and a TensorRT engine."""

__version__ = "0.1.0"
