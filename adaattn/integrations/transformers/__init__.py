"""Let models of Hugging Face transformers attend within an error budget: `attn_implementation="adaattn"`.

Transformers calls one function for the attention of all its models and another for their masks; `register` adds
AdaAttn's under a name. Nothing here imports transformers before that.
"""

from adaattn.integrations.transformers.registration import register, register_calibration, set_tolerance
from adaattn.integrations.transformers.registry import configs_of, takes_implementations, tolerance_of

__all__ = ["configs_of", "register", "register_calibration", "set_tolerance", "takes_implementations", "tolerance_of"]
