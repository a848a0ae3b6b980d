"""TODO export/onnx."""
