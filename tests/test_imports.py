"""A fresh process pays only for what it uses: `import adaattn` loads no torch, no module loads an optional package."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPTIONAL = (
    "triton",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "transformers",
)
OURS = ("adaattn.export", "adaattn.plugins")
EVERYTHING = "from adaattn import *; import adaattn, adaattn.ops; [getattr(adaattn, name) for name in adaattn.__all__]"


def fresh(code: str) -> str:
    """Return what a new interpreter prints, which has imported nothing but what its start imports."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import adaattn; dir(adaattn); adaattn.__version__", (*OPTIONAL, *OURS, "torch", "numpy")),
        ("import adaattn; adaattn.DenseAttention", (*OPTIONAL, *OURS)),
        (EVERYTHING, (*OPTIONAL, *OURS)),
    ],
)
def test_nothing_more_is_imported(code: str, banned: tuple[str, ...]) -> None:
    assert fresh(f"{code}\nimport sys; print(*(name for name in {banned!r} if name in sys.modules))") == ""


def test_names_are_the_same_by_every_road() -> None:
    code = """
from adaattn.attention.adaptive_rank import AdaptiveRankAttention
from adaattn.attention.adaptive_precision import AdaptivePrecisionAttention
from adaattn.attention.dense import DenseAttention
import adaattn, torch
assert adaattn.AdaptiveRankAttention is AdaptiveRankAttention
assert adaattn.AdaptivePrecisionAttention is AdaptivePrecisionAttention
assert adaattn.DenseAttention is DenseAttention
assert set(adaattn.__all__) <= set(dir(adaattn))
torch.ops.adaattn.adaptive_attention, torch.ops.adaattn.token_moments  # a module alone registers what it calls
print("done")
"""
    assert fresh(code) == "done"


def test_an_unknown_name_says_which_there_are() -> None:
    import adaattn

    with pytest.raises(AttributeError, match=r"'Dense'; it has .*DenseAttention"):
        _ = adaattn.Dense
