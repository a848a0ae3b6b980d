"""Build, describe and load engines of TensorRT and TensorRT-RTX. Only the child process imports them."""
