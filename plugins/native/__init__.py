"""The plugins as a shared library, for trtexec, C++, Triton Inference Server and ONNX Runtime's TensorRT provider."""
