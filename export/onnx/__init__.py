"""Lower a captured program to an ONNX model, and save it."""
