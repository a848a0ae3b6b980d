"""Models of transformers that attend with AdaAttn, against their own eager attention in float64.

One file, though long: its tables of architectures serve most of the tests.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.export import Dim

import adaattn
from adaattn.calibration.projections import find_projections
from adaattn.errors import AdaAttnError, ConfigError
from adaattn.export.golden.plan_mode import PlanMode, run_eager
from adaattn.export.options import Options
from adaattn.export.parity.criterion import FACTOR, RULES
from adaattn.export.parity.metrics import relative_error
from adaattn.export.pipeline import export
from adaattn.integrations.transformers import attention as attention_module
from adaattn.integrations.transformers import register, set_tolerance, tolerance_of
from tests.support import architectures
from tests.support.architectures import build, inputs, shown

EXACT, ALWAYS = "adaattn-exact", "adaattn-always"  # unrounded, dense only for single tokens; never dense
SHAPES = [(1, 1, "none"), (2, 17, "none"), (1, 9, "none"), (3, 13, "left"), (3, 13, "right"), (2, 12, "full")]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()
    register(precisions=("fp32",), low_rank=False, dense_below=2, name=EXACT)
    register(dense_below=0, name=ALWAYS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the arguments with which adaptive attention is called."""
    seen: list[dict[str, Any]] = []
    function = attention_module.adaptive_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool, **options: Any) -> Any:
        seen.append({"queries": query.shape[2], "keys": key.shape[2], "mask": mask, "causal": is_causal, **options})
        return function(query, key, value, mask, is_causal=is_causal, **options)

    monkeypatch.setattr(attention_module, "adaptive_attention", spy)
    return seen


def error(got: Tensor, want: Tensor) -> float:
    return relative_error((got.double() - want.double()).abs().numpy(), want.double().numpy())


def first(model: nn.Module, given: dict[str, Tensor], mode: PlanMode | None = None) -> Tensor:
    return run_eager(model, given, mode)[0]


def exact(eager: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Return the model in float64, also where its code asks for float32."""
    double = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    return first(copy.deepcopy(eager).double(), double, PlanMode(double=True))


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_unrounded_attention_is_eager_attention(name: str) -> None:
    """To float32 rounding: as the exporter's verdicts, twice eager's own error and a floor."""
    eager = build(name, "eager")
    model = build(name, EXACT, eager)
    for batch, length, padding in SHAPES:
        given = inputs(name, batch, length, padding)
        want = shown(name, exact(eager, given), given)
        limit = FACTOR * error(shown(name, first(eager, given), given), want) + RULES["float32"].floor
        found = error(shown(name, first(model, given), given), want)
        assert found <= limit, (batch, length, padding, found, limit)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_errors_are_in_proportion_to_the_tolerance(name: str) -> None:
    """The tolerance is of each attention's output, which is a part of what its layer adds to the stream.

    Over three seeds, kinds of padding and tolerances the outputs of these models erred by 0.00 to 0.71 of it; the bound
    is the whole.
    """
    eager = build(name, "eager")
    model = build(name, ALWAYS, eager)
    given = inputs(name, 3, 33, "right")
    want = shown(name, exact(eager, given), given)
    errors = {}
    for tolerance in (1e-2, 1e-4):
        set_tolerance(model, tolerance)
        with PlanMode():
            errors[tolerance] = error(shown(name, first(model, given), given), want)
        assert errors[tolerance] <= tolerance, errors
    assert errors[1e-2] > 10 * errors[1e-4], errors  # rounded, and less so where asked


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_finds_eagers_words(name: str, cache: str, calls: list[dict[str, Any]]) -> None:
    eager = build(name, "eager")
    given = inputs(name, 3, 11, "left")
    given.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = cache
    want = eager.generate(**given, **options)
    assert torch.equal(build(name, EXACT, eager).generate(**given, **options), want)
    assert calls
    assert all(call["queries"] > 1 or call["keys"] == 1 for call in calls)  # decode steps were dense


def test_decode_steps_may_be_adaptive_too(calls: list[dict[str, Any]]) -> None:
    register(precisions=("fp32",), low_rank=False, dense_below=0, name="adaattn-exact-always")
    eager = build("llama", "eager")
    given = inputs("llama", 2, 7)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    got = build("llama", "adaattn-exact-always", eager).generate(**given, **options)
    assert torch.equal(got, eager.generate(**given, **options))
    assert [call["queries"] for call in calls] == [7, 7] + [1, 1] * 4
    assert [call["causal"] for call in calls] == [True, True] + [False, False] * 4


def test_a_long_prompt_over_a_cache_is_adaptive(calls: list[dict[str, Any]]) -> None:
    register(dense_below=4)
    model = build("llama", "adaattn")
    ids = inputs("llama", 1, 12)["input_ids"]
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:8], past_key_values=cache)
        assert len(calls) == 2
        model(ids[:, 8:], past_key_values=cache)
    register()
    assert [(call["queries"], call["keys"]) for call in calls] == [(5, 5)] * 2 + [(4, 12)] * 2
    assert calls[-1]["mask"] is not None  # is_causal is aligned at the top left, and this is not


@pytest.mark.parametrize(("name", "causal"), [("bert", False), ("gpt2", True), ("llama", True), ("vit", False)])
def test_no_mask_where_nothing_is_padded(name: str, causal: bool, calls: list[dict[str, Any]]) -> None:
    for padding in ("none", "full"):
        first(build(name, "adaattn"), inputs(name, 2, 9, padding))
    assert [(call["mask"], call["causal"]) for call in calls] == [(None, causal)] * 4


def test_padding_makes_a_boolean_mask(calls: list[dict[str, Any]]) -> None:
    given = inputs("llama", 2, 9, "left")
    first(build("llama", "adaattn"), given)
    want = given["attention_mask"].bool()[:, None, None, :] & torch.ones(9, 9, dtype=torch.bool).tril()
    for call in calls:
        assert torch.equal(call["mask"], want)
        assert not call["causal"]


def attend(query: Tensor, key: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Call the attention as a model's code does."""
    module = nn.Module()
    module.config = hf.BertConfig()  # type: ignore[assignment]
    key = query if key is None else key
    output: Tensor = hf.AttentionInterface()["adaattn"](module, query, key, key, mask, **options)[0]
    return output


def test_a_query_without_keys_gives_zeros() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    output = attend(torch.randn(1, 2, 5, 8), mask=mask)
    assert output.shape == (1, 5, 2, 8)
    assert (output == 0).all(dim=(0, 2, 3)).tolist() == [False, False, True, False, False]
    bias = torch.randn(1, 2, 5, 5)
    assert (attend(torch.randn(1, 2, 5, 8), mask=mask, position_bias=bias)[:, 2] == 0).all()


@pytest.mark.parametrize("name", ["bert", "mistral", "bart"])
def test_programs_have_no_length_of_their_own(name: str) -> None:
    model = build(name, ALWAYS, use_cache=False)
    batch, length, target = Dim("batch", min=1, max=8), Dim("length", min=1, max=40), Dim("target", min=1, max=40)
    example = inputs(name, 2, 6, "right")
    shapes = {key: {0: batch, 1: target if key.startswith("decoder") else length} for key in example}
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    ranges = {(int(limits.lower), int(limits.upper)) for limits in program.range_constraints.values()}
    assert ranges == {(1, 8), (1, 40)}
    attention = [node for node in program.graph.nodes if "adaptive_attention" in str(node.target)]
    assert len(attention) == (6 if name == "bart" else 2)
    for size in ((1, 1, "none"), (3, 11, "left"), (2, 40, "right")):
        given = inputs(name, *size)
        given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        got = first(program.module(), given)
        torch.testing.assert_close(shown(name, got, given), shown(name, first(model, given), given))


class DecodeStep(nn.Module):
    """One token of Llama over a cache, as it is deployed: the cache comes in and goes out as tensors."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = hf.LlamaConfig(vocab_size=99, intermediate_size=48, initializer_range=0.3, **sizes)
        self.model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="adaattn")

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache = hf.DynamicCache()
        cache.update(keys, values, 0)
        output = self.model(ids, past_key_values=cache)
        return output.logits, cache.layers[0].keys, cache.layers[0].values


def test_a_decode_step_is_verified_as_the_program_computes_it(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    """By default eager is dense below 64 queries; the program, which has no sizes, is adaptive at every length."""
    model = DecodeStep().eval()
    cache = "B,2,P,16:float32"
    result = export(
        model,
        {"ids": "B,1:int64<99", "keys": cache, "values": cache},
        tmp_path / "out",
        dims={"B": "1:1:2", "P": "1:8:20"},
        options=Options(targets=("onnx",)),
    )
    assert result.passed, result.report["targets"][0]["reason"]
    assert len(calls) > 1  # beside the capture: the runs that verify it
    calls.clear()
    past = torch.randn(1, 2, 6, 16)
    with torch.no_grad():
        model(torch.tensor([[3]]), past, past)
    assert not calls  # the user's own runs are as they were


def test_the_tolerance_is_the_models_own(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    model, other = build("bert", "adaattn"), build("bert", "adaattn")
    set_tolerance(model, 0.25)
    first(model, inputs("bert", 1, 5))
    first(other, inputs("bert", 1, 5))
    assert [call["tolerance"] for call in calls] == [0.25, 0.25, 1e-2, 1e-2]
    assert (tolerance_of(model), tolerance_of(other), tolerance_of(nn.Linear(1, 1))) == (0.25, 1e-2, None)
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path, attn_implementation="adaattn")
    assert tolerance_of(again) == 0.25
    again.set_attn_implementation("sdpa")
    assert tolerance_of(again) is None
    again.set_attn_implementation("adaattn")
    assert tolerance_of(again) == 0.25


def test_dropout_is_dense_and_its_absence_is_not(calls: list[dict[str, Any]]) -> None:
    for dropout, adaptive in ((0.5, 0), (0.0, 2)):
        model = build("bert", "adaattn", attention_probs_dropout_prob=dropout).train()
        model(**inputs("bert", 2, 7)).last_hidden_state.square().sum().backward()
        assert len(calls) == adaptive
        assert all(x.grad is not None and x.grad.any() for n, x in model.named_parameters() if "query.weight" in n)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "packed"),
        ({"sliding_window": 4}, "window of keys"),
    ],
)
def test_what_it_has_not_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        attend(torch.randn(1, 2, 5, 8), **options)


def test_what_changes_nothing_is_taken() -> None:
    x = torch.randn(1, 2, 5, 8)
    want = attend(x)
    options = {"softcap": None, "s_aux": None, "output_attentions": False, "position_ids": torch.arange(5)}
    assert torch.equal(attend(x, sliding_window=5, **options), want)


def test_whole_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="BertSelfAttention asks for output_attentions"):
        build("bert", "adaattn")(**inputs("bert", 1, 5), output_attentions=True)
    sizes = architectures.GROUPED
    capped = hf.AutoModel.from_config(hf.Gemma2Config(**sizes, head_dim=8), attn_implementation="adaattn")
    with pytest.raises(ConfigError, match="Gemma2Attention asks for a cap"):
        capped(**inputs("gemma2", 1, 5))
    # Its code adds the mask to the scores by itself.
    alone = hf.AutoModel.from_config(hf.MPNetConfig(**architectures.SIZES), attn_implementation="adaattn")
    with pytest.raises(ConfigError, match="modeling_mpnet of this transformers does not dispatch through"):
        alone(**inputs("mpnet", 1, 5))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tolerance": 0}, "tolerance is 0"),
        ({"precisions": ("int4",)}, "int4"),
        ({"dense_below": -1}, "dense_below is -1"),
        ({"name": "sdpa"}, "name is 'sdpa'"),
        ({"name": "adaattn/kernel"}, "begin with adaattn"),
    ],
)
def test_wrong_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        register(**options)


def test_a_tolerance_needs_something_to_act_on() -> None:
    with pytest.raises(AdaAttnError, match="BertModel has no adaptive attention"):
        set_tolerance(build("bert", "sdpa"), 1e-3)
    with pytest.raises(AdaAttnError, match="tolerance is -1"):
        set_tolerance(build("bert", "adaattn"), -1)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_autocast_is_taken_as_by_sdpa(name: str) -> None:
    given = inputs(name, 2, 33)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want, got = (build(name, kind)(**given)[0].float() for kind in ("sdpa", EXACT))
    assert error(got, want) < 3e-2


def test_a_model_that_attends_by_itself_takes_no_tolerance() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = hf.DebertaV2Config(vocab_size=99, **sizes)
    model = hf.AutoModel.from_config(config, attn_implementation="adaattn")
    with pytest.raises(ConfigError, match="DebertaV2Model does not dispatch through"):
        set_tolerance(model, 1e-2)
    assert set(find_projections(model).values()) == {"it does not dispatch through transformers' AttentionInterface"}


def test_a_model_typed_into_a_shell_is_calibrated(tmp_path: Path) -> None:
    """Its class has no source that could be read."""
    namespace: dict[str, Any] = {"nn": nn}
    code = """class Typed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
    def forward(self, **given):
        return self.model(**given)[0]"""
    exec(code, namespace)
    given = inputs("bert", 2, 17)
    assert len(adaattn.calibrate(namespace["Typed"](build("bert", ALWAYS)), [given]).layers) == 2


def opt() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = hf.OPTConfig(vocab_size=99, max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3, **sizes)
    return hf.OPTForCausalLM._from_config(config, attn_implementation=EXACT).eval()


def test_calibration_with_a_cache_counts_the_calls_own_keys() -> None:
    ids = torch.randint(3, 99, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batches = ({"input_ids": ids, "attention_mask": mask, "past_key_values": hf.DynamicCache()} for _ in range(3))
    result = adaattn.calibrate(opt(), batches)
    assert [spectrum.tokens for spectrum in result.layers.values()] == [3 * 35] * 2

    class Generates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = opt()

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)

    result = adaattn.calibrate(Generates(), [(ids, mask)])
    assert [spectrum.tokens for spectrum in result.layers.values()] == [35 + 2 * 2] * 2


def test_calibration_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        result = adaattn.calibrate(build("bert", EXACT), [inputs("bert", 2, 17)])
    assert (len(result.layers), result.refused) == (2, {})


def test_a_tolerance_may_be_a_number_of_numpy(tmp_path: Path) -> None:
    model = build("bert", ALWAYS)
    set_tolerance(model, np.float32(0.25))
    model.save_pretrained(tmp_path)
    assert model.config.adaattn_tolerance == 0.25
    with pytest.raises(ConfigError, match="tolerance is 'much'; give a relative error"):
        set_tolerance(model, "much")


def test_relative_positions_between_projection_and_scores_are_not_calibrated() -> None:
    """Parakeet adds a bias to queries and multiplies them with positions, too."""
    config = hf.ParakeetEncoderConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_mel_bins=16,
        subsampling_conv_channels=8,
        conv_kernel_size=3,
        initializer_range=0.3,
    )
    model = hf.ParakeetEncoder._from_config(config, attn_implementation=EXACT).eval()
    x = torch.randn(2, 160, 16)
    with torch.no_grad():
        want = model(x)[0]
        result = adaattn.calibrate(model, [x])
        assert torch.equal(model(x)[0], want)
    assert result.layers == {}
    assert all("changes its output" in reason for reason in result.refused.values())


def test_transformers_is_imported_by_register_alone() -> None:
    code = """
import sys
import adaattn.integrations.transformers as ours
from adaattn import AdaAttnError
assert "transformers" not in sys.modules
sys.modules["transformers"] = None  # as if it were not installed
try:
    ours.register()
except AdaAttnError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("pip install 'adaattn[transformers]'"), done.stderr
