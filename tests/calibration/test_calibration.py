"""Calibration gathers energy, keeps results, counts the tokens that count, and can be interrupted.

One file, though long: all of it is told on the same few models and the same correlated data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import adaattn
from adaattn.attention.base import AttentionBase
from adaattn.calibration import calibrate
from adaattn.calibration import projections as pairs_module
from adaattn.calibration.balancing import FLOOR, SecondMoments, balance, energies
from adaattn.calibration.projections import QueryKeyProjections, find_projections, register_matcher
from adaattn.conversion import Conversion, convert
from adaattn.errors import CheckpointError, ConfigError
from tests.support import oracle

WIDTH, HEADS = 64, 4
DIM = WIDTH // HEADS


def correlated(*shape: int) -> Tensor:
    """Tokens whose covariance falls fast, in a basis that is random and always the same."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=generator, dtype=torch.float64))[0]
    deviations = (4 * 2 ** (-torch.arange(shape[-1]) / 1.5)).clamp_min(1e-3)
    return (torch.randn(shape, dtype=torch.float64) * deviations @ basis.T).float()


def heads_of(module: AttentionBase, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = module._project(query, key, key[..., :1].expand(*key.shape[:2], module.vdim or module.embed_dim))
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def moments(q: Tensor, k: Tensor, attended: Tensor | None = None) -> SecondMoments:
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    linears = (nn.Linear(1, heads * dim), nn.Linear(1, kv_heads * dim))
    sums = SecondMoments.zeros(QueryKeyProjections(nn.Identity(), *linears, heads, kv_heads, dim, 1.0, lambda *_: None))
    sums.add(q, k, attended)
    return sums


def condition(basis: tuple[Tensor, Tensor]) -> float:
    return float(torch.linalg.matrix_norm(basis[0], 2).mul(torch.linalg.matrix_norm(basis[1], 2)).max())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_basis_balances_both_moments_and_is_the_best_at_every_rank(kv_heads: int) -> None:
    mixing = torch.randn(2, DIM, DIM).double()
    q, k = (
        torch.randn(3, HEADS, 50, DIM).double() @ mixing[0],
        torch.randn(3, kv_heads, 41, DIM).double() @ mixing[1] + 5,
    )
    sums = moments(q, k)
    a, inverse = balance(sums)
    torch.testing.assert_close(a @ inverse, torch.eye(DIM).double().expand_as(a), rtol=0, atol=1e-10)
    pooled = q.unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)
    centred = (k - k.mean(2, keepdim=True)).transpose(0, 1).flatten(1, 2)
    new_q, new_k = pooled @ a, centred @ inverse.mT
    q_moment, k_moment = (x.mT @ x / x.shape[1] for x in (new_q, new_k))
    largest = q_moment.amax()
    torch.testing.assert_close(q_moment, k_moment, rtol=0, atol=float(largest) * 1e-9)
    torch.testing.assert_close(
        q_moment, torch.diag_embed(q_moment.diagonal(dim1=1, dim2=2)), rtol=0, atol=float(largest) * 1e-9
    )
    # The mean square of what leaving out dimensions takes from the scores, for other bases: raw, and keys' principal.
    old_q, old_k = (x.mT @ x / x.shape[1] for x in (pooled, centred))
    principal = torch.linalg.eigh(old_k)[1].flip(-1)
    left_out = _left_out(q_moment, k_moment)
    for basis in (torch.eye(DIM).double().expand_as(a), principal):
        assert (
            left_out <= _left_out(basis.mT @ old_q @ basis, basis.mT @ old_k @ basis) * (1 + 1e-9) + 1e-15 * largest**2
        ).all()
    singular = torch.linalg.svdvals(torch.linalg.cholesky(old_q).mT @ torch.linalg.cholesky(old_k)).square()
    torch.testing.assert_close(left_out, singular.flip(-1).cumsum(-1).flip(-1), rtol=1e-6, atol=0)
    grouped = energies(sums, 0.5, a, inverse).unflatten(0, (kv_heads, -1)).mean(1)
    torch.testing.assert_close(grouped.flip(-1).cumsum(-1).flip(-1), left_out / 4, rtol=1e-6, atol=0)


def _left_out(query: Tensor, key: Tensor) -> Tensor:
    """tr(Cq·Ck) over the dimensions from each rank on: exact also where dimensions are correlated."""
    return torch.stack([(query[:, r:, r:] * key[:, r:, r:]).sum((1, 2)) for r in range(query.shape[1])], -1)


MAKERS = {
    "adaptive": lambda **o: adaattn.AdaptiveAttention(WIDTH, HEADS, **o),
    "rank": lambda **o: adaattn.AdaptiveRankAttention(WIDTH, HEADS, **o),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, no bias": {"num_kv_heads": 2, "bias": False},
    "one kv head, causal": {"num_kv_heads": 1, "causal": True},
    "widths": {"kdim": 10, "vdim": 7},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_scores_and_outputs_at_full_rank_stay(name: str, options: str) -> None:
    given = OPTIONS[options]
    module = MAKERS[name](tolerance=1e-7, **given)
    for projection in (module.q_proj, module.k_proj):
        if projection.bias is not None:
            nn.init.normal_(projection.bias)
    exact = copy.deepcopy(module).double()
    batches = [
        (correlated(2, 33, WIDTH), *(correlated(2, 35, given.get(n, WIDTH)) for n in ("kdim", "vdim")))
        for _ in range(4)
    ]
    query, key, _ = batches[0]
    want, want_scores = exact(*(x.double() for x in batches[0]))[0], _scores(exact, query.double(), key.double())
    before = oracle.error(module(*batches[0])[0], want)

    assert list(calibrate(exact, [[x.double() for x in batch] for batch in batches]).layers) == [""]
    got_scores = _scores(exact, query.double(), key.double())
    assert (got_scores - want_scores).norm() / want_scores.norm() < oracle.EXACT
    torch.testing.assert_close(exact(*(x.double() for x in batches[0]))[0], want, rtol=1e-10, atol=1e-12)

    weights = module.q_proj.weight
    result = calibrate(module, batches)
    assert not result.refused
    assert module.q_proj.weight is weights
    after = oracle.error(module(*batches[0])[0], want)
    assert (after <= torch.maximum(2 * before, torch.tensor(2e-6))).all()


def _scores(module: AttentionBase, query: Tensor, key: Tensor) -> Tensor:
    q, k = heads_of(module, query, key)
    return q @ k.mT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_round_once_more_and_no_worse(dtype: torch.dtype) -> None:
    module = adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-7).to(dtype)
    exact = copy.deepcopy(module).double()
    x = correlated(2, 65, WIDTH).to(dtype)
    want = _scores(exact, x.double(), x.double())
    before = (_scores(module, x, x) - want).norm() / want.norm()
    calibrate(module, [(x, x, x)])
    assert module.q_proj.weight.dtype == dtype
    assert (_scores(module, x, x) - want).norm() / want.norm() <= 2 * before


@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
@pytest.mark.parametrize("name", MAKERS)
def test_ranks_fall_and_errors_stay_within_the_tolerance(name: str, tolerance: float) -> None:
    module = MAKERS[name](tolerance=tolerance).eval()
    with torch.no_grad():
        module.q_proj.weight.mul_(3)
    exact, fresh = copy.deepcopy(module), correlated(2, 129, WIDTH)
    module(fresh, fresh, fresh)
    before = module.get_rank_statistics()
    result = calibrate(module, [(x, x, x) for x in (correlated(4, 65, WIDTH) for _ in range(8))])
    assert module.get_rank_statistics()["plans"] == 0
    output, _ = module(fresh, fresh, fresh)
    after = module.get_rank_statistics()
    assert after["mean_rank"] <= before["mean_rank"] - DIM / 4
    assert oracle.error(output, oracle.module(exact, fresh, fresh, fresh)[0]).max() <= tolerance
    spectrum = result.layers[""]
    assert spectrum.before.shape == spectrum.after.shape == (HEADS, DIM)
    assert spectrum.tokens == 8 * 4 * 65
    old, new = spectrum.ranks(0.999)
    assert sum(new) < sum(old)
    assert (spectrum.after.diff(dim=-1) <= FLOOR * spectrum.after[:, :1]).all()


def spectra(module: nn.Module, batches: list[Any]) -> Tensor:
    result = calibrate(copy.deepcopy(module), batches)
    return torch.stack([*(s.before for s in result.layers.values()), *(s.after for s in result.layers.values())])


@pytest.mark.parametrize("masked", [False, -torch.inf, -1e9], ids=str)
def test_padding_does_not_count(masked: float) -> None:
    module = adaattn.AdaptiveAttention(WIDTH, HEADS, num_kv_heads=2)
    q, k = correlated(2, 9, WIDTH), correlated(2, 17, WIDTH)
    padded = torch.cat([k, torch.full((2, 5, WIDTH), 1e4)], 1)
    mask = torch.full((2, 22), True if masked is False else 0.0)
    mask[:, 17:] = masked
    want = spectra(module, [(q, k, k)])
    for given in (mask, mask[:, None].expand(2, 9, 22), mask[:, None, None].expand(2, HEADS, 9, 22)):
        torch.testing.assert_close(spectra(module, [(q, padded, padded, given)]), want, rtol=1e-9, atol=1e-12)
    # By name too; and entries of other lengths are centred each by itself.
    shorter = {"query": q, "key": padded, "value": padded, "attention_mask": mask.clone()}
    shorter["attention_mask"][1, 4:] = masked
    separate = [(q[:1], k[:1], k[:1]), (q[1:], k[1:, :4], k[1:, :4])]
    torch.testing.assert_close(spectra(module, [shorter]), spectra(module, separate), rtol=1e-9, atol=1e-12)


def test_a_key_that_only_some_heads_see_counts_for_those() -> None:
    q, k = torch.randn(1, 4, 5, 3), torch.randn(1, 2, 6, 3)
    attended = torch.ones(1, 2, 6, dtype=torch.bool)
    attended[:, 1, 2:] = False
    sums = moments(q, k, attended)
    assert sums.keys.tolist() == [6, 2]
    torch.testing.assert_close(sums.key[1], moments(q, k[:, :, :2]).key[1])
    torch.testing.assert_close(sums.key[0], moments(q, k).key[0])


DEGENERATE = {
    "one token": lambda q, k: (q[:, :, :1], k[:, :, :1]),
    "two tokens": lambda q, k: (q[:, :, :2], k[:, :, :2]),
    "fewer tokens than dimensions": lambda q, k: (q[:, :, :5], k[:, :, :7]),
    "constant keys": lambda q, k: (q, k[:, :, :1].expand_as(k) * (1 + 1e-8 * torch.randn_like(k))),
    "constant dimensions": lambda q, k: (q * (torch.arange(DIM) > 5), k * (torch.arange(DIM) % 2)),
    "disjoint": lambda q, k: (q * (torch.arange(DIM) < 8), k * (torch.arange(DIM) >= 8)),
    "zero queries": lambda q, k: (q * 0, k),
    "tiny": lambda q, k: (q * 1e-30, k * 1e-30),
    "far apart": lambda q, k: (q * 1e15, k * 1e-15),
    "biased keys": lambda q, k: (q, k + 1e3),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_poor_statistics_make_a_sound_basis(kind: str) -> None:
    q, k = (x.double() for x in DEGENERATE[kind](torch.randn(1, 2, 40, DIM), torch.randn(1, 2, 40, DIM)))
    basis = balance(moments(q, k))
    assert all(bool(x.isfinite().all()) for x in basis)
    assert condition(basis) <= 1.01 * FLOOR**-0.5
    torch.testing.assert_close(basis[0] @ basis[1], torch.eye(DIM).double().expand(2, -1, -1), rtol=0, atol=1e-8)
    # Folded in float32, scores of data unlike these err by some roundings.
    other = torch.randn(2, 1, 2, 50, DIM).double()
    got = (other[0].float() @ basis[0].float()) @ (other[1].float() @ basis[1].mT.float()).mT
    want = other[0] @ other[1].mT
    assert float((got - want).norm() / want.norm()) < 10 * 2.0**-24
    if kind in ("one token", "constant keys", "zero queries"):
        torch.testing.assert_close(basis[0], torch.eye(DIM).double().expand(2, -1, -1), rtol=0, atol=0)


class Model(nn.Module):
    """Attention of every kind, some of it twice, in an encoder of torch's and beside it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        convert(self.encoder, Conversion(tolerance=1e-2))
        self.rank = adaattn.AdaptiveRankAttention(WIDTH, HEADS, tolerance=1e-2)
        self.dense = adaattn.DenseAttention(WIDTH, HEADS)
        self.fixed = adaattn.AdaptivePrecisionAttention(WIDTH, HEADS)
        self.random = adaattn.AdaptiveRankAttention(WIDTH, HEADS, rank_estimation_method="random")
        self.unused = adaattn.AdaptiveAttention(WIDTH, HEADS)
        self.frozen = nn.Dropout().eval()

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.encoder(x, src_key_padding_mask=padding)
        for attention in (self.rank, self.rank, self.dense, self.fixed, self.random):
            x = x + self.frozen(attention(x, x, x)[0])
        return x


def test_a_whole_model_is_calibrated_and_left_as_it_was() -> None:
    model = Model().train()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    model.frozen.eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    x = correlated(2, 33, WIDTH)
    padding = torch.arange(33) >= torch.tensor([[33], [20]])
    seen: list[int] = []
    result = calibrate(model, [x, (x, padding), [x], {"x": x, "padding": padding}], on_batch=seen.append)
    assert seen == [1, 2, 3, 4]
    assert result.batches == 4
    names = ["encoder.layers.0.self_attn.attention", "encoder.layers.1.self_attn.attention", "rank"]
    assert list(result.layers) == names
    assert [result.layers[n].tokens for n in names] == [2 * 2 * 33 + 2 * 53] * 2 + [2 * 4 * 2 * 33]
    never = "it never cuts the rank, so no basis makes it cheaper"
    assert {n: r for n, r in result.refused.items() if r != never} == {
        "random": "it rotates queries and keys at random after their projections",
        "unused": "no batch reached it",
    }
    assert [n for n, r in result.refused.items() if r == never] == ["dense", "fixed"]
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, state[n])}
    assert changed == {f"{n}.{p}.{w}" for n in names for p in ("q_proj", "k_proj") for w in ("weight", "bias")}
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = Model().train()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    x = correlated(1, 5, WIDTH)
    for bad in ([x, 3], [], iter(())):
        with pytest.raises(ConfigError, match=r"a batch is 3; give a tensor|no batch to calibrate with"):
            calibrate(model, bad)
    with pytest.raises(ConfigError, match="save_every is 0"):
        calibrate(model, [x], save_every=0)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())


def test_nan_does_not_reach_the_weights() -> None:
    module = adaattn.AdaptiveAttention(WIDTH, HEADS)
    x = torch.full((1, 3, WIDTH), torch.nan)
    assert calibrate(module, [(x, x, x)]).refused == {"": "its queries or keys are not finite"}
    assert all(p.isfinite().all() for p in module.parameters())


def test_shared_and_altered_projections_are_refused() -> None:
    model = nn.ModuleList([adaattn.AdaptiveAttention(WIDTH, HEADS) for _ in range(5)])
    model[1].q_proj = model[0].q_proj
    model[2].k_proj.weight = nn.Parameter(model[2].k_proj.weight.detach())
    model.embedding = nn.Module()
    model.embedding.table = model[2].k_proj.weight
    nn.utils.parametrizations.orthogonal(model[3].q_proj)
    found = find_projections(model)
    assert [isinstance(found[str(i)], str) for i in range(5)] == [True, True, True, True, False]
    assert "shares" in found["0"]
    assert "parametrized" in found["3"]


class Interrupt(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = adaattn.Encoder(WIDTH, HEADS, ("adaptive", "adaptive_rank"))
    batches = [correlated(2, 7, WIDTH) for _ in range(5)]
    straight, path = copy.deepcopy(model), tmp_path / "statistics.pt"
    want = calibrate(straight, batches)

    def stop(done: int) -> None:
        if done == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        calibrate(model, batches, resume=path, save_every=2, on_batch=stop)
    seen: list[int] = []
    again = copy.deepcopy(model)
    got = calibrate(again, iter(batches), resume=path, save_every=2, on_batch=seen.append)
    assert seen == [3, 4, 5]
    assert all(torch.equal(got.layers[n].after, s.after) for n, s in want.layers.items())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), straight.parameters(), strict=True))
    assert list(tmp_path.iterdir()) == [path]
    # A run that was done needs no batch again; more batches add to it.
    assert calibrate(copy.deepcopy(model), batches, resume=path).batches == 5
    assert calibrate(copy.deepcopy(model), [*batches, batches[0]], resume=path).batches == 6
    with pytest.raises(CheckpointError, match="other weights, maybe of this model before its calibration"):
        calibrate(again, batches, resume=path)
    with pytest.raises(CheckpointError, match="another model"):
        calibrate(adaattn.AdaptiveAttention(WIDTH, HEADS), [], resume=path)


@pytest.mark.parametrize("payload", [b"", b"text", {"format": "adaattn"}, None], ids=str)
def test_a_file_of_another_kind_is_refused(payload: Any, tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    module, x = adaattn.AdaptiveAttention(WIDTH, HEADS), correlated(1, 3, WIDTH)
    if isinstance(payload, bytes):
        path.write_bytes(payload)
    elif payload is not None:
        torch.save(payload, path)
    else:
        calibrate(copy.deepcopy(module), [(x, x, x)], resume=path)
        whole = torch.load(path, weights_only=True)
        torch.save(whole | {"layers": {"": 3}}, path)
    with pytest.raises(CheckpointError):
        calibrate(module, [(x, x, x)], resume=path)


def _negative(layer: dict[str, Tensor], field: str) -> dict[str, Tensor]:
    return layer | {field: -layer[field] - 1}


DAMAGE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]]] = {
    "version, a tensor": lambda whole, layer: {"version": torch.tensor([2, 2])},
    "version, of another type": lambda whole, layer: {"version": "2"},
    "batches, missing": lambda whole, layer: {"batches": None},
    "batches, a text": lambda whole, layer: {"batches": "1"},
    "batches, a truth": lambda whole, layer: {"batches": True},
    "batches, negative": lambda whole, layer: {"batches": -1},
    "batches, huge": lambda whole, layer: {"batches": 10**30},
    "weights, a list": lambda whole, layer: {"weights": [whole["weights"]]},
    "tried, a list": lambda whole, layer: {"tried": [""]},
    "tried, None": lambda whole, layer: {"tried": None},
    "tried, numbers": lambda whole, layer: {"tried": {"": 3}},
    "tried, of others": lambda whole, layer: {"tried": {"other": None}},
    "layers, a list": lambda whole, layer: {"layers": [layer]},
    "layers, numbers": lambda whole, layer: {"layers": {"": 3}},
    "layers, none": lambda whole, layer: {"layers": {}},
    "layers, nested": lambda whole, layer: {"layers": {"": {"": layer}}},
    "a field missing": lambda whole, layer: {"layers": {"": {k: x for k, x in layer.items() if k != "keys"}}},
    "a field more": lambda whole, layer: {"layers": {"": layer | {"more": layer["keys"]}}},
    "a field, a list": lambda whole, layer: {"layers": {"": layer | {"keys": layer["keys"].tolist()}}},
    "a field, float32": lambda whole, layer: {"layers": {"": {k: x.float() for k, x in layer.items()}}},
    "a field, sparse": lambda whole, layer: {"layers": {"": layer | {"query": layer["query"].to_sparse()}}},
    "a field on meta": lambda whole, layer: {"layers": {"": layer | {"query": layer["query"].to("meta")}}},
    "a field of another shape": lambda whole, layer: {"layers": {"": layer | {"query": layer["query"][:1]}}},
    **{f"{f}, negative": lambda w, layer, f=f: {"layers": {"": _negative(layer, f)}} for f in ("query", "key", "keys")},
}


@pytest.fixture(scope="module")
def whole_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("state") / "statistics.pt"
    torch.manual_seed(0)
    x = correlated(2, 30, WIDTH)
    calibrate(adaattn.AdaptiveAttention(WIDTH, HEADS), [(x, x, x)], resume=path)
    held: dict[str, Any] = torch.load(path, weights_only=True)
    return held


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse tensors
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_in_one_line(damage: str, whole_state: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = correlated(2, 30, WIDTH), tmp_path / "statistics.pt"
    module = adaattn.AdaptiveAttention(WIDTH, HEADS)
    before = copy.deepcopy(module.state_dict())
    torch.save(whole_state | DAMAGE[damage](whole_state, whole_state["layers"][""]), path)
    with pytest.raises(CheckpointError, match="delete it") as caught:
        calibrate(module, [(x, x, x)], resume=path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e308], ids=str)
@pytest.mark.parametrize("field", ["query", "key", "key_power"])
def test_statistics_without_a_meaning_change_no_weight(
    field: str, value: float, whole_state: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x, path = correlated(2, 30, WIDTH), tmp_path / "statistics.pt"
    module = adaattn.AdaptiveAttention(WIDTH, HEADS)
    before = copy.deepcopy(module.state_dict())
    layer = whole_state["layers"][""]
    torch.save(whole_state | {"layers": {"": layer | {field: torch.full_like(layer[field], value)}}}, path)
    result = calibrate(module, [(x, x, x)], resume=path)
    assert all(p.isfinite().all() for p in module.state_dict().values())
    if not result.layers:
        assert "statistics" in result.refused[""] or "not finite" in result.refused[""]
        assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())


class Foreign(nn.Module):
    """Attention as other libraries write it: projections of its own, a mask under a name and in a form of its own."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        attention_mask = options.get("attention_mask")
        q, k, v = (p(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.children())
        return nn.functional.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2).flatten(2)


def find_foreign(module: nn.Module) -> QueryKeyProjections | str | None:
    if not isinstance(module, Foreign):
        return None

    def attended(arguments: Mapping[str, Any], batch: int, queries: int, keys: int) -> Tensor | None:
        mask = arguments.get("attention_mask")
        return None if mask is None else (mask > -1e4).any(2)

    dim = WIDTH // module.heads
    return QueryKeyProjections(module, module.query, module.key, module.heads, module.heads, dim, dim**-0.5, attended)


def test_attention_of_another_library_is_found_by_its_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "_matchers", list(pairs_module._matchers))
    model = nn.Sequential(Foreign(), nn.LayerNorm(WIDTH), Foreign())
    x = correlated(2, 17, WIDTH)
    assert calibrate(model, [x]).layers == {}
    register_matcher(find_foreign)
    want = model(x)
    result = calibrate(model, [x])
    assert list(result.layers) == ["0", "2"]
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    alone, mask = Foreign(), torch.zeros(2, 1, 1, 17)
    mask[..., 9:] = torch.finfo(torch.float32).min
    result = calibrate(alone, [{"hidden_states": x, "attention_mask": mask}])
    assert result.layers[""].tokens == 2 * 9


def scaled(linear: nn.Linear, factor: Any) -> None:
    linear.register_forward_hook(lambda module, args, output: output * factor)


def replaced(linear: nn.Linear) -> None:
    forward = linear.forward
    linear.forward = lambda x: forward(x) * torch.linspace(0.5, 2, WIDTH)  # type: ignore[method-assign]


def one_memory(linear: nn.Linear, other: nn.Linear) -> None:
    other.weight = nn.Parameter(linear.weight.data)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pruned": (lambda m: prune.l1_unstructured(m.q_proj, "weight", 0.3), "no plain torch.nn.Linear"),
    "weight norm": (lambda m: nn.utils.weight_norm(m.q_proj), "no plain torch.nn.Linear"),
    "spectral norm": (lambda m: nn.utils.spectral_norm(m.k_proj), "no plain torch.nn.Linear"),
    "a forward of its own": (lambda m: replaced(m.q_proj), "no plain torch.nn.Linear"),
    "one memory": (lambda m: one_memory(m.q_proj, m.k_proj), "shares the weights"),
    "a hook": (lambda m: scaled(m.q_proj, torch.linspace(0.5, 2, WIDTH)), "changes its output"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", CHANGES)
def test_projections_that_are_not_what_they_seem_are_left_alone(change: str) -> None:
    apply, said = CHANGES[change]
    module, x = adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-7), correlated(2, 31, WIDTH)
    apply(module)
    module.eval()
    want = module(x, x, x)[0]
    result = calibrate(module, [(x, x, x)])
    assert result.layers == {}
    assert said in result.refused[""]
    assert torch.equal(module(x, x, x)[0], want)


def test_a_hook_that_commutes_is_no_hindrance() -> None:
    module, x = adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-7), correlated(2, 31, WIDTH)
    scaled(module.q_proj, 2.0)
    want = module(x, x, x)[0]
    assert list(calibrate(module, [(x, x, x)]).layers) == [""]
    torch.testing.assert_close(module(x, x, x)[0], want, rtol=1e-4, atol=1e-4)


class Relative(Foreign):
    """As where positions are multiplied with the queries, or dimensions scaled, between projection and scores."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        scale = torch.linspace(0.5, 2, WIDTH // self.heads, dtype=hidden_states.dtype)
        q, k, v = (p(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.children())
        return nn.functional.scaled_dot_product_attention(q * scale, k, v).transpose(1, 2).flatten(2)


def test_code_that_makes_more_of_queries_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "_matchers", [*pairs_module._matchers, find_foreign])
    model = nn.Sequential(Foreign(), Relative(), Foreign()).half()
    x = correlated(2, 17, WIDTH).half()
    result = calibrate(model, [x])
    assert list(result.layers) == ["0", "2"]
    assert "another basis of its queries and keys changes its output (by" in result.refused["1"]


def test_what_no_batch_reaches_is_left_alone() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (adaattn.AdaptiveAttention(WIDTH, HEADS) for _ in range(2))

        def forward(self, x: Tensor, second: bool) -> Tensor:
            return (self.b if second else self.a)(x, x, x)[0]

    x = correlated(1, 31, WIDTH)
    result = calibrate(Either(), [(x, False), (x, False)])
    assert list(result.layers) == ["a"]
    assert result.refused == {"b": "no batch reached it"}
    assert list(calibrate(Either(), [(x, False), (x, True)]).layers) == ["a", "b"]


class Boxed(Relative):
    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        return {"a": ({"h": super().forward(hidden_states)},)}


@pytest.mark.parametrize("kind", [Relative, Boxed])
@pytest.mark.parametrize("shows_nothing", ["one token", "equal tokens"])
def test_a_batch_that_shows_nothing_decides_nothing(
    kind: type[Foreign], shows_nothing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax over one key, or over equal ones, does not depend on the queries."""
    monkeypatch.setattr(pairs_module, "_matchers", [*pairs_module._matchers, find_foreign])
    x = correlated(2, 17, WIDTH)
    dull = x[:, :1] if shows_nothing == "one token" else x[:, :1].expand(2, 17, WIDTH)
    assert "changes its output (by" in calibrate(kind(), [dull, x]).refused[""]
    result = calibrate(kind(), [dull])
    assert (result.layers, "no batch shows whether" in result.refused[""]) == ({}, True)
    assert list(calibrate(Foreign(), [dull, x]).layers) == [""]


def test_statistics_are_of_all_the_weights(tmp_path: Path) -> None:
    model = adaattn.Encoder(WIDTH, HEADS, ("adaptive",))
    batches, path = [correlated(2, 7, WIDTH)], tmp_path / "statistics.pt"
    calibrate(copy.deepcopy(model), batches, resume=path)
    for name, change in (("mlp.2.bias", lambda x: x + 1), ("attention.q_proj.weight", lambda x: x.flip(0))):
        other = copy.deepcopy(model)
        weight = other.get_parameter(f"stack.0.{name}")
        weight.data = change(weight.data)
        with pytest.raises(CheckpointError, match="other weights"):
            calibrate(other, batches, resume=path)
    seen: list[int] = []
    with pytest.raises(CheckpointError, match="cannot be written"):
        calibrate(model, batches, resume=tmp_path / "none" / "statistics.pt", on_batch=seen.append)
    assert not seen


def test_a_pair_whose_sizes_do_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="key has 30 features; expected 2 heads of 16"):
        QueryKeyProjections(nn.Identity(), nn.Linear(8, 64), nn.Linear(8, 30), 4, 2, 16, 0.25, lambda *_: None)
    with pytest.raises(ConfigError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        QueryKeyProjections(nn.Identity(), nn.Linear(8, 64), nn.Linear(8, 48), 4, 3, 16, 0.25, lambda *_: None)
