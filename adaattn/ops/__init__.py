"""The custom ops `adaattn::token_moments` and `adaattn::adaptive_attention`. Importing this package registers them."""

from adaattn.ops.adaptive_attention.api import adaptive_attention
from adaattn.ops.token_moments.api import token_moments

__all__ = ["adaptive_attention", "token_moments"]
