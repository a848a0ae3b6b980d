"""From a model to verified ONNX and TensorRT artifacts."""
