"""Register the custom ops `token_moments`, `plan` and `adaptive_attention` of namespace `adaattn`.

`plan` is not called by hand; `adaattn.ops.plan.api.plan_within` is its entrance.
"""

from adaattn.ops.adaptive_attention.api import adaptive_attention
from adaattn.ops.plan.ops import plan
from adaattn.ops.token_moments.api import token_moments

__all__ = ["adaptive_attention", "plan", "token_moments"]
