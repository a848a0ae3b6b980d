"""Build the plugins as a shared library, for trtexec, C++, Triton Inference Server and ONNX Runtime."""
