"""Folders of transformers and sentence-transformers through `adaattn-export hf:FOLDER`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

from adaattn.export import Options, export
from adaattn.export.artifacts.folder import model_name
from adaattn.export.sources import huggingface
from adaattn.export.sources.huggingface import load, longest_of
from adaattn.export.sources.sentence_pooling import Pooling, pooling_of
from adaattn.export.sources.source import usable
from adaattn.integrations.transformers import register, set_tolerance
from tests.support import architectures
from tests.support.architectures import LONGEST, WORDS
from tests.support.cli import refused, run

TEXT = {"input_ids": f"B,S:int64<{WORDS}", "attention_mask": "B,S:int64<2"}
SEGMENTS = {**TEXT, "token_type_ids": "B,S:int64<2"}
POOLING = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    hf.utils.logging.disable_progress_bar()  # save_pretrained has one, and standard error is looked at
    yield
    hf.utils.logging.enable_progress_bar()


def saved(name: str, cls: type | None = None, **changes: Any) -> Path:
    """Return a folder as save_pretrained writes it."""
    model = architectures.build(name, "sdpa", **changes)
    if cls is not None:
        torch.manual_seed(2)
        model = cls(model.config)
    model.save_pretrained("folder")
    return Path("folder")


def sentence_encoder(modules: list[dict[str, str]] | None = None, pooling: dict[str, Any] | None = None) -> Path:
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    folder = saved("bert")
    Path("folder/1_Pooling").mkdir()
    Path("folder/1_Pooling/config.json").write_text(json.dumps(pooling or POOLING))
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    Path("folder/modules.json").write_text(json.dumps(modules or listed))
    return folder


def exported(source: Path, *arguments: object) -> dict[str, Any]:
    """Return the report of an export to ONNX, which passes."""
    result = run(f"hf:{source}", "--target", "onnx", "--json", "-o", "out", *arguments)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    (target,) = report["targets"]
    assert (report["verdict"], target["verdict"]) == ("passed", "passed"), target["reason"]
    return report


def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])


def test_a_classifier_of_text() -> None:
    """And golden masks have sequences that end, that are empty, and that are whole."""
    report = exported(saved("bert", hf.BertForSequenceClassification, num_hidden_layers=1), "--tolerance", "1e-3")
    assert report["inputs"].keys() == SEGMENTS.keys()
    assert report["dims"] == {"B": "1:1:8", "S": f"1:{LONGEST}:{LONGEST}"}
    assert [(layer["tolerance"], layer["head_dim"]) for layer in report["layers"]] == [(1e-3, 8)]
    assert report["layers"][0]["name"] == "model.bert.encoder.layer.0.attention.self"
    assert [output.name for output in session().get_outputs()] == ["logits"]
    with np.load("out/golden.npz") as golden:
        masks = {case: golden[f"{case}/input/attention_mask"] for case in ("shortest", "odd", "outliers", "longest")}
    assert all(mask.dtype == np.int64 and set(mask.ravel()) <= {0, 1} for mask in masks.values())
    assert masks["shortest"].all()
    assert not masks["odd"][0].any()
    assert 0 < masks["longest"].mean() < 1


def test_a_decoder() -> None:
    """Its file agrees with transformers' own attention, as far as the tolerance goes."""
    report = exported(saved("llama", num_hidden_layers=1), "--tolerance", "1e-4")
    assert report["inputs"] == {"input_ids": "B,S:int64", "attention_mask": "B,S:int64"}
    ids = torch.randint(0, WORDS, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    (logits,) = session().run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        want = architectures.build("llama", "eager", num_hidden_layers=1)(input_ids=ids, attention_mask=mask).logits
    error = (torch.from_numpy(logits) - want)[mask.bool()]
    assert error.square().mean().sqrt() < 1e-4 * want.square().mean().sqrt()


def test_a_classifier_of_images() -> None:
    report = exported(saved("vit"))
    assert report["inputs"] == {"pixel_values": "B,3,24,24:float32"}
    assert [each["became"] for each in report["attentions"]] == ["scaled_dot_product_attention"] * 2
    assert report["layers"] == []


def test_a_real_sentence_encoder(minilm: Path) -> None:
    """MiniLM-L6's embeddings of sentences are those of its recipe, computed by transformers alone."""
    folder = minilm
    # tests/benchmarks/test_minilm.py verifies, with --thorough
    result = run(f"hf:{folder}", "--target", "onnx", "--tolerance", "1e-2", "--no-verify", "-o", "out")
    assert result.exit_code == 0, result.output
    assert [output.name for output in session().get_outputs()] == ["sentence_embedding"]
    words = hf.AutoTokenizer.from_pretrained(folder)(
        ["A cat sits on the mat.", "There is a cat.", "Interest rates rose by half a point in March."],
        padding=True,
        return_tensors="pt",
    )
    (got,) = session().run(None, {name: x.numpy() for name, x in words.items()})
    with torch.no_grad():
        states = hf.AutoModel.from_pretrained(folder, attn_implementation="eager")(**words).last_hidden_state
    mask = words["attention_mask"].unsqueeze(-1)
    want = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar = (torch.from_numpy(got) * want).sum(-1)
    assert (similar > 0.9999).all()  # one layer's tolerance of 1e-2 is an angle of 1e-2, a cosine of 1 - 5e-5
    assert got[0] @ got[1] > 0.5 > 0.2 > got[0] @ got[2]


@pytest.mark.parametrize(
    ("name", "inputs", "longest"),
    [
        ("roberta", SEGMENTS, LONGEST - 2),  # positions begin behind the padding's
        ("distilbert", TEXT, LONGEST),
        ("gpt2", TEXT, LONGEST),
        ("t5", {**TEXT, "decoder_input_ids": f"B,T:int64<{WORDS}"}, 512),
        ("vit", {"pixel_values": "B,3,24,24"}, 512),
    ],
)
def test_inputs(name: str, inputs: dict[str, str], longest: int) -> None:
    source = huggingface.load(saved(name))
    assert {spec.name: str(spec) for spec in source.inputs} == inputs
    assert {dim.max for dim in source.dims} == {longest}
    assert not source.model.training  # type: ignore[union-attr]


def test_outputs_have_their_names() -> None:
    source = huggingface.load(saved("bart", use_cache=True))
    given = architectures.inputs("bart", 2, 9, "right")
    assert list(source.model(**given)) == ["logits", "encoder_last_hidden_state"]  # type: ignore[operator]


def test_a_tolerance_in_the_folder_is_kept() -> None:
    register()
    model = architectures.build("gpt2", "adaattn", n_layer=1)
    set_tolerance(model, 0.125)
    model.save_pretrained("kept")
    assert huggingface.load(Path("kept")).tolerance == 0.125
    report = exported(Path("kept"))
    assert [layer["tolerance"] for layer in report["layers"]] == [0.125]


@pytest.mark.parametrize(
    ("settings", "mode"),
    [(POOLING, "mean"), ({"pooling_mode": "cls"}, "cls"), ({"pooling_mode_cls_token": True}, "cls")],
)
def test_pooling(settings: dict[str, Any], mode: str) -> None:
    pooling = pooling_of(sentence_encoder(pooling=settings))
    assert pooling == Pooling(mode, normalize=True)
    states, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    means = torch.stack([states[0, :2].mean(0), torch.zeros(4), states[2, 1:].mean(0)])
    want = states[:, 0] if mode == "cls" else means
    torch.testing.assert_close(Pooling(mode, normalize=False)(states, mask), want)
    torch.testing.assert_close(Pooling(mode, normalize=True)(states, mask), F.normalize(want, dim=-1))


def no_config() -> Path:
    (folder := Path("folder")).mkdir()
    return folder


def pickled_weights() -> Path:
    folder = saved("bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def weights_left_out() -> Path:
    folder = saved("bert")
    state = {name: x for name, x in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights_damaged() -> Path:
    folder = saved("bert")
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def code_of_its_own() -> Path:
    folder = saved("bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "shop", "auto_map": {"AutoModel": "modeling_shop.Shop"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_shop.py").write_text("open('sprung', 'w')\n")
    return folder


def configured(**changes: Any) -> Callable[[], Path]:
    """Return a folder whose config.json says something else of the weights."""

    def make() -> Path:
        folder = saved("bert", num_hidden_layers=1)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


def config_that_is(text: str) -> Callable[[], Path]:
    def make() -> Path:
        folder = saved("bert", num_hidden_layers=1)
        (folder / "config.json").write_text(text)
        return folder

    return make


def text_and_images() -> Path:
    sizes = {key: architectures.SIZES[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")}
    image = hf.CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=24, patch_size=8)
    text = hf.CLIPTextConfig(**sizes, num_attention_heads=4, vocab_size=WORDS, bos_token_id=0, eos_token_id=2)
    hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict())).save_pretrained("folder")
    return Path("folder")


def pooling_by_maximum() -> Path:
    return sentence_encoder(pooling={**POOLING, "pooling_mode_max_tokens": True})


def a_layer_behind() -> Path:
    return sentence_encoder([{"type": f"a.{kind}", "path": ""} for kind in ("Transformer", "Pooling", "Dense")])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (no_config, ["has no config.json"]),
        (pickled_weights, ["no weights in safetensors", "--allow-pickle"]),
        (weights_left_out, ["lacks weights of BertModel", "pooler.dense", "random"]),
        (weights_damaged, ["cannot be loaded by transformers"]),
        (code_of_its_own, ["'shop'", "unknown to transformers", "never run"]),
        (configured(num_hidden_layers=10**6), ["asks for more weights than the file holds"]),
        (configured(hidden_size=2**30), ["its weights have other sizes than config.json says"]),
        (configured(vocab_size=2**40), ["its weights have other sizes than config.json says"]),
        (configured(vocab_size="x"), ["Validation error for field 'vocab_size'", "int"]),
        (configured(model_type=["bert"]), ["unknown to transformers"]),
        (config_that_is("[" * 100_000), ["config.json is not a config of transformers"]),
        (config_that_is("[]"), ["config.json is not a config of transformers"]),
        (text_and_images, ["CLIPModel", "input_ids, pixel_values"]),
        (pooling_by_maximum, ["mean and max", "known here are mean and cls"]),
        (a_layer_behind, ["Transformer, Pooling, Dense", "modules.json"]),
    ],
)
def test_refused(source: Any, words: list[str]) -> None:
    refused(run(f"hf:{source()}", "-q"), *words)
    assert not Path("sprung").exists()
    assert not Path("folder-export").exists()


def mixture(name: str) -> Path:
    sizes = {**architectures.GROUPED, "num_hidden_layers": 1, "num_experts_per_tok": 2}
    torch.manual_seed(1)
    if name == "mixtral":
        hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_local_experts=4)).save_pretrained("folder")
    else:
        config = hf.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=16, head_dim=8)
        hf.Qwen3MoeForCausalLM(config).save_pretrained("folder")
    return Path("folder")


OWN_CODE: dict[str, tuple[Any, Any, list[str]]] = {  # models that call no function of transformers for attention
    "mpnet": (hf.MPNetModel, hf.MPNetConfig(**architectures.SIZES), []),
    "falcon": (
        hf.FalconForCausalLM,
        hf.FalconConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        [],
    ),
    "gemma2": (
        hf.Gemma2Model,
        hf.Gemma2Config(**architectures.GROUPED, head_dim=8),
        ["layers.0.self_attn", "a cap (tanh)"],
    ),
    "output_attentions": (
        hf.BertModel,
        hf.BertConfig(**architectures.SIZES, attn_implementation="eager", output_attentions=True),
        ["encoder.layer.1.attention.self", "its weights are used elsewhere too"],
    ),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "output_attentions" else pytest.param(name, marks=pytest.mark.thorough) for name in OWN_CODE],
)
def test_attention_of_a_models_own(name: str) -> None:
    cls, config, words = OWN_CODE[name]
    torch.manual_seed(1)
    cls(config).save_pretrained("folder")
    report = exported(Path("folder"), "--dim", "S=1:8:16", "--tolerance", "1e-3")
    assert len(report["attentions"]) == 2
    if not words:
        assert {each["became"] for each in report["attentions"]} == {"adaptive_attention"}
        assert not report["warnings"]
        return
    for each in report["attentions"]:
        assert each["became"] is None
        assert words[1] in each["reason"]
    assert words[0] in {each["path"].removeprefix("model.") for each in report["attentions"]}
    assert report["warnings"] == ["--tolerance changes nothing: no attention of the model can be adaptive"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts(name: str) -> None:
    exported(mixture(name), "--tolerance", "1e-4", "--dim", "S=2:8:16")


def test_a_mixture_that_a_caller_built_is_left_as_it_is() -> None:
    model = hf.MixtralForCausalLM.from_pretrained(mixture("mixtral"))
    before = model.config._experts_implementation
    used = usable(model)
    assert isinstance(used, hf.MixtralForCausalLM)
    assert (used.config._experts_implementation, model.config._experts_implementation) == ("batched_mm", before)
    assert usable(used) is used


def test_weights_are_in_memory() -> None:
    """Mapped, they would crash the process when someone truncates their file."""
    folder = saved("bert", num_hidden_layers=1)
    kept = huggingface.load(folder)
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    del kept


def test_pickled_weights_need_permission() -> None:
    assert huggingface.load(pickled_weights(), allow_pickle=True).inputs


def test_a_pooler_that_no_embedding_uses_may_be_missing() -> None:
    folder = sentence_encoder()
    state = {name: x for name, x in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert huggingface.load(folder).inputs


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_an_embedding_comes_from_weights_saved_with_a_head(name: str) -> None:
    folder = sentence_encoder()
    head = {"bert": hf.BertForMaskedLM, "t5": hf.T5ForConditionalGeneration}[name]
    saved(name, head)
    Path("folder/1_Pooling/config.json").write_text(json.dumps({**POOLING, "word_embedding_dimension": 32}))
    source = load(folder)
    ids = torch.randint(0, WORDS, (2, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert source.model(**given)["sentence_embedding"].shape == (2, 32)


def test_hidden_states_that_the_config_asks_for_are_outputs() -> None:
    load_kept = load(saved("bert", output_hidden_states=True)).model
    ids = torch.randint(0, WORDS, (2, 9))
    found = load_kept(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert [name for name in found if name.startswith("hidden_states")] == [f"hidden_states_{i}" for i in range(3)]


def test_words_are_not_taken_for_positions() -> None:
    """A table of as many words as positions has a padding that moves none of them."""
    model = load(saved("bert", vocab_size=LONGEST, max_position_embeddings=LONGEST)).model
    assert longest_of(model.model) == LONGEST


def test_other_words_on_the_command_line() -> None:
    folder = saved("bert")
    refused(run(f"hf:{folder}", "--weights", "w.pt", "-q"), "--weights goes with package.module:factory")
    refused(run(folder, "-q"), "folder is a folder", "hf:FOLDER of Hugging Face transformers")
    assert model_name("hf:models/all-MiniLM-L6-v2.1") == "all-MiniLM-L6-v2.1"


def test_a_tolerance_reaches_a_registered_model(tmp_path: Path) -> None:
    register()
    model = architectures.build("bert", "adaattn")
    options = Options(("onnx",), tolerance=0.125, verify=False)
    inputs, dims = {"input_ids": TEXT["input_ids"]}, {"S": "1:8:16"}
    export(model, inputs, tmp_path / "out", dims=dims, options=options)
    assert not hasattr(model.config, "adaattn_tolerance")  # the caller's stays as it is
    model.set_attn_implementation("sdpa")
    found = export(model, inputs, tmp_path / "other", dims=dims, options=options).report["attentions"]
    assert [each["was"] for each in found] == ["scaled_dot_product_attention"] * 2
    assert [each["became"] for each in found] == ["adaptive_attention"] * 2
