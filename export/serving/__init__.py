"""Package artifacts for ONNX Runtime's TensorRT provider and for Triton Inference Server."""
