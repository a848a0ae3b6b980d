"""The ONNX functions against the torch ops that they stand for: two texts of one specification, held together here."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import adaattn.ops  # noqa: F401 registers what torch.ops.adaattn names
from adaattn.export.onnx import functions
from adaattn.ops.plan.impl import reference
from adaattn.planning import ladder
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def run(name: str, opset: int, attributes: dict[str, object], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of a model that is one call of the function."""
    function = functions.function(name, opset)
    names = list(function.input)
    node = helper.make_node(name, names, list(function.output), domain=functions.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one_call",
        [
            helper.make_tensor_value_info(n, TYPES[x.dtype], [None] * x.dim())
            for n, x in zip(names, inputs, strict=True)
        ],
        [onnx.ValueInfoProto(name=n) for n in function.output],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(functions.DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def draw(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    x = torch.randn(shape)
    if kind == "outliers":
        x += 10 * torch.randn(shape) * (torch.rand(shape) < 0.01)
    if kind == "sink":
        x += 5
        x[..., 0, :] += 12
    scale = {"tiny": 1e-20, "huge": 1e15}.get(kind, 1.0)
    return torch.full(shape, 0.7) if kind == "constant" else x * scale + (5 if kind == "biased" else 0)


KINDS = ["normal", "outliers", "biased", "tiny", "huge", "constant"]


@pytest.mark.parametrize("opset", [18, 22, 24])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 4, 17, 20)])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_token_moments(opset: int, kind: str, shape: tuple[int, ...], center: bool, masked: bool) -> None:
    torch.manual_seed(1)
    x = draw(shape, kind)
    mask = torch.rand(shape[0], 1, shape[2]) < 0.7
    mask[0] = False
    inputs = [x, mask] if masked else [x]
    got = run("token_moments_masked" if masked else "token_moments", opset, {"center": int(center)}, inputs)
    want = torch.ops.adaattn.token_moments(x, mask if masked else None, center)
    peak = float(x.abs().max())
    for ours, theirs, unit in zip(got, want, (peak, peak**2, peak, peak**2), strict=True):
        # A mean can cancel, and so can a token with its mean: what is left is the last bits of numbers of that size.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * unit if unit == peak or center else 0.0)


@pytest.mark.parametrize("kind", [*KINDS, "sink", "overflow", "zero"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 1e-2, 1e-1])
def test_plan(kind: str, heads: tuple[int, int], tolerance: float) -> None:
    torch.manual_seed(2)
    head_dim, scale = 20, 20**-0.5
    options = Budget(tolerance)
    table = ladder.ladder_table(options, head_dim)
    factor = {"overflow": 1e25, "zero": 0.0}.get(kind, 1.0)
    spread = torch.logspace(0, -2, head_dim)  # so that some ranks are worth cutting
    q, k, v = (draw((3, n, 33, head_dim), kind) * factor * spread for n in (heads[0], heads[1], heads[1]))
    moments = [
        Moments(*torch.ops.adaattn.token_moments(x, None, center)) for x, center in ((q, False), (k, True), (v, False))
    ]
    inputs = [*moments[0], *moments[1][1:], *moments[2][1:3], table]
    got = run("plan", 22, {"scale": scale, "limit": options.limit}, inputs)
    want = reference.choose(*moments, table, scale, options.limit)
    assert torch.equal(got[0], want.precision)
    assert torch.equal(got[1], want.rank)
    torch.testing.assert_close(got[2], want.predicted_error, rtol=1e-5, atol=0.0)


def test_plan_op_is_the_plan_function() -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 9, 16)
    table = ladder.ladder_table(Budget(1e-2), 16)
    q, k, v = (Moments(*torch.ops.adaattn.token_moments(x, None, center)) for center in (False, True, False))
    arguments = (*q, *k[1:], *v[1:3], table, 0.25, 0.008)
    want = reference.choose(q, k, v, table, 0.25, 0.008)
    for ours, theirs in zip(torch.ops.adaattn.plan(*arguments), want, strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(torch.ops.adaattn.plan.default, arguments)


MASKS = ["none", "padding", "query", "empty_rows", "additive"]


def make_mask(kind: str, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "padding":
        return torch.arange(keys).view(1, 1, 1, keys) < max(1, keys - 3)
    mask = torch.rand(batch, 1, queries, keys) < 0.7
    if kind == "empty_rows":
        mask[:, :, 0] = False
    return torch.randn(batch, heads, queries, keys).masked_fill(~mask, -torch.inf) if kind == "additive" else mask


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 8), (2, 10, 5, 17, 9, 20), (1, 10, 10, 7, 33, 16)])
@pytest.mark.parametrize("kind", ["normal", "outliers", "biased", "constant"])
def test_adaptive_attention(mask: str, causal: bool, dtype: torch.dtype, sizes: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(4)
    batch, heads, kv_heads, queries, keys, head_dim = sizes
    q = draw((batch, heads, queries, head_dim), kind).to(dtype)
    k, v = (draw((batch, kv_heads, keys, head_dim), kind).to(dtype) for _ in range(2))
    mean, peak = k.float().mean(2), v.float().abs().amax(2)
    precision = (torch.arange(batch * heads) % 5).view(batch, heads).int()  # every precision, twice
    rank = torch.where(torch.arange(batch * heads) % 3 == 0, head_dim // 2, head_dim).view(batch, heads).int()
    bias = make_mask(mask, batch, heads, queries, keys)
    inputs = [q, k, v, mean, peak, precision, rank]
    name = "adaptive_attention"
    if bias is not None:
        bias = bias if bias.dtype == torch.bool else bias.to(dtype)
        inputs.append(bias)
        name += "_masked" if bias.dtype == torch.bool else "_biased"
    (got,) = run(name, 18, {"scale": 0.3, "is_causal": int(causal)}, inputs)
    want = torch.ops.adaattn.adaptive_attention(q, k, v, mean, peak, precision, rank, bias, 0.3, causal, "reference")
    assert got.isfinite().all()
    # Beside sums in another order, a number halfway between two of the format may round either way.
    size = want.double().square().mean((2, 3)).sqrt().clamp_min(1e-30)
    error = (got.double() - want.double()).square().mean((2, 3)).sqrt() / size
    allowed = torch.tensor([2e-6, 4e-4, 5e-5, 1e-3, 4e-3])[precision.long()] + (1e-3 if dtype == torch.float16 else 0)
    assert (error <= allowed).all(), (error / allowed).max()
    if mask == "empty_rows":
        assert (got[:, :, 0] == 0).all()


def test_fp8_rounding_is_that_of_the_type() -> None:
    """Every representable number, every midpoint, their neighbours, and a million others."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, middle, torch.rand(1 << 20) * 900 - 450, 2.0 ** (torch.rand(1 << 20) * 30 - 20)])
    points = torch.cat(
        [points, torch.nextafter(points, torch.tensor(1e9)), torch.nextafter(points, torch.tensor(-1e9))]
    )
    text = functions._SIGNED_FP8.format(x="x")
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        rounding (float[N] x) => (float[N] x_fp8) {{
            fp8_max = Constant <value_float: float = 448.0> ()
            fp8_floor = Constant <value_float: float = 24576.0> ()
            two_20 = Constant <value_float: float = 1048576.0> ()
            {text}
        }}""")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": points.numpy()})
    want = points.clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(got, want)
