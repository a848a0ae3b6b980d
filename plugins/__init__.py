"""How TensorRT finds the plugins of our ops: every exported node carries this namespace and version."""

NAMESPACE = "adaattn"
VERSION = "1"
