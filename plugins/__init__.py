"""Name the namespace and version by which TensorRT finds the plugins; every exported node carries them."""

NAMESPACE = "adaattn"
VERSION = "1"
