"""Run what an export made, in ONNX Runtime, TensorRT or TensorRT-RTX, with one interface.

    with open_runtime("model-export") as model:
        outputs = model(query=q, key=k, value=v)

Arrays of NumPy give arrays; tensors of torch give tensors on their device, and on CUDA nothing is copied. The package
imports neither models nor the exporter, and torch only where tensors or engines ask for it.
"""

from adaattn.export.runtime.base import Runtime, TensorInfo, Timing
from adaattn.export.runtime.open import open_runtime

__all__ = ["Runtime", "TensorInfo", "Timing", "open_runtime"]
