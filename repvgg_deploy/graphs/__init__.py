"""ONNX graphs: made from nets, written, read back."""
