"""Export models that nobody here wrote, from small random configurations and with no edit of their source.

    python -m benchmarks.models [NAME ...]

Each is captured, its attention made adaptive at a tolerance of 1e-2, lowered to ONNX, and verified in ONNX Runtime
against float64. Prints a table, writes benchmarks/results/models.json and, where all were run, docs/models.md.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from adaattn.input_spec import Dimension, InputSpec

RESULTS, PAGE = Path(__file__).parent / "results", Path(__file__).parent.parent / "docs" / "models.md"
TOLERANCE = 1e-2
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 99, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
TOKENS = ("input_ids=B,S:int64<99", "attention_mask=B,S:int64<2:attend")
IMAGE = ("pixel_values=B,3,32,32",)
DIMS = {"B": "1:1:2", "S": "1:12:32", "T": "1:8:16"}


@dataclass(frozen=True)
class Entry:
    """A model: its package and class, the arguments of its configuration, and its inputs."""

    package: str
    name: str
    arguments: dict[str, Any]
    inputs: Sequence[str]
    attention: bool = True  # False: a control without any


def _hf(name: str, arguments: dict[str, Any], inputs: Sequence[str] = TOKENS, attention: bool = True) -> Entry:
    return Entry("transformers", name, arguments, inputs, attention)


def _parts(**more: Any) -> dict[str, Any]:
    """Return the arguments of models with an encoder and a decoder."""
    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    return {"d_model": 32, **layers, **heads, **more}


_CAUSAL = {"use_cache": False}
MODELS: dict[str, Entry] = {
    "BERT": _hf("BertModel", {**TEXT, "max_position_embeddings": 32}),
    "ALBERT": _hf("AlbertModel", {**TEXT, "embedding_size": 16, "max_position_embeddings": 32}),
    "DeBERTa-v3": _hf(
        "DebertaV2Model",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "max_position_embeddings": 32,
        },
    ),
    "MPNet": _hf("MPNetModel", {**TEXT, "max_position_embeddings": 40}),
    "XLNet": _hf("XLNetModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 99}),
    "ModernBERT": _hf("ModernBertModel", {**TEXT, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}),
    "GPT-2": _hf("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 99}),
    "GPT-Neo": _hf(
        "GPTNeoModel",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "vocab_size": 99,
            "max_position_embeddings": 32,
        },
    ),
    "BLOOM": _hf("BloomModel", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "Falcon": _hf(
        "FalconModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    ),
    "Llama": _hf("LlamaForCausalLM", GROUPED),
    "Qwen3": _hf("Qwen3Model", GROUPED),
    "Gemma 3": _hf("Gemma3TextModel", {**GROUPED, "sliding_window": 8}),
    "Gemma 2": _hf("Gemma2Model", {**GROUPED, "sliding_window": 8}),
    "Mixtral": _hf("MixtralModel", {**GROUPED, "num_local_experts": 4}),
    "DeepSeek-V3": _hf(
        "DeepseekV3Model",
        {
            **TEXT,
            **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8},
            **{"qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
            **{"topk_group": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 16},
        },
    ),
    "gpt-oss": _hf("GptOssModel", {**GROUPED, "num_local_experts": 4, "sliding_window": 8}),
    "T5": _hf(
        "T5Model",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
        (*TOKENS, "decoder_input_ids=B,T:int64<99"),
    ),
    "BART": _hf(
        "BartModel",
        _parts(vocab_size=99, max_position_embeddings=32, pad_token_id=1, decoder_start_token_id=2),
        (*TOKENS, "decoder_input_ids=B,T:int64<99"),
    ),
    "Whisper": _hf(
        "WhisperModel",
        _parts(
            vocab_size=99,
            num_mel_bins=16,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
        ("input_features=B,16,32", "decoder_input_ids=B,T:int64<99"),
    ),
    "Wav2Vec2": _hf(
        "Wav2Vec2Model",
        {
            **TEXT,
            **{"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        },
        ("input_values=B,400",),
    ),
    "ViT": _hf("ViTModel", VISION, IMAGE),
    "CLIP, image": _hf("CLIPVisionModel", VISION, IMAGE),
    "CLIP, text": _hf("CLIPTextModel", {**TEXT, "max_position_embeddings": 32}),
    "SigLIP": _hf("SiglipVisionModel", VISION, IMAGE),
    "DINOv2": _hf("Dinov2Model", VISION, IMAGE),
    "DINOv3": _hf("DINOv3ViTModel", VISION, IMAGE),
    "Swin": _hf(
        "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        IMAGE,
    ),
    "Swin v2": _hf(
        "Swinv2Model",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        IMAGE,
    ),
    "SAM": _hf(
        "SamVisionModel",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48, "image_size": 32},
            **{"patch_size": 8, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]},
        },
        IMAGE,
    ),
    "ConvNeXt": _hf("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, IMAGE, False),
    "Mamba": _hf(
        "MambaModel",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4},
        ("input_ids=B,12:int64<99",),
        False,
    ),
    "DiT": Entry(
        "diffusers",
        "DiTTransformer2DModel",
        {
            **{"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2},
            **{"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        },
        ("hidden_states=B,4,8,8", "timestep=B:int64<1000", "class_labels=B:int64<10"),
    ),
    "SD UNet": Entry(
        "diffusers",
        "UNet2DConditionModel",
        {
            **{"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4},
            **{"cross_attention_dim": 16, "attention_head_dim": 4},
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        ("sample=B,4,8,8", "timestep=B:int64<1000", "encoder_hidden_states=B,S,16"),
    ),
    "SD3": Entry(
        "diffusers",
        "SD3Transformer2DModel",
        {
            **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8},
            **{"num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32},
            **{"pooled_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 8},
        },
        (
            *("hidden_states=B,4,8,8", "encoder_hidden_states=B,S,32", "pooled_projections=B,16"),
            "timestep=B:int64<1000",
        ),
    ),
    "VAE": Entry(
        "diffusers",
        "AutoencoderKL",
        {
            **{"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16},
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        },
        ("sample=B,3,16,16",),
    ),
    "nn.Transformer": Entry(
        "torch",
        "Transformer",
        {"d_model": 32, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 48},
        ("src=B,S,32", "tgt=B,T,32"),
    ),
    "a hand-written GPT": Entry("", "GPT", {}, ("ids=B,S:int64<99",)),
}


def build(entry: Entry) -> Any:
    """Return a model of random weights, in eval mode."""
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    if entry.package == "transformers":
        import transformers

        transformers.logging.set_verbosity_error()
        cls = getattr(transformers, entry.name)
        config = cls.config_class(**entry.arguments)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        return cls(config).eval()
    if entry.package == "diffusers":
        import diffusers

        return getattr(diffusers, entry.name)(**entry.arguments).eval()
    if entry.package == "torch":
        return torch.nn.Transformer(**entry.arguments, batch_first=True).eval()
    from benchmarks.gpt import GPT

    return GPT().eval()


def random_samples(specs: Sequence[InputSpec], dims: Mapping[str, Dimension], count: int) -> list[dict[str, Tensor]]:
    """Return random inputs of a model, each of other sizes within its dimensions and with a batch of 1."""
    import torch

    generator, found = torch.Generator().manual_seed(7), []
    for _ in range(count):
        sizes = {
            name: int(torch.randint(dim.min, dim.max + 1, (), generator=generator)) for name, dim in dims.items()
        } | {"B": 1}
        sample = {}
        for spec in specs:
            shape = [sizes.get(str(size), size) for size in spec.shape]
            if spec.meaning == "attend":
                sample[spec.name] = torch.ones(shape, dtype=torch.int64)
            elif spec.below:
                sample[spec.name] = torch.randint(0, spec.below, shape, generator=generator)
            else:
                sample[spec.name] = torch.randn(shape, generator=generator)
        found.append(sample)
    return found


def measure(name: str) -> dict[str, Any]:
    """Export a model and return its row of the table."""
    from adaattn.errors import AdaAttnError
    from adaattn.export import Options, export
    from adaattn.input_spec import InputSpec

    entry = MODELS[name]
    specs = [InputSpec.parse(*given.split("=", 1)) for given in entry.inputs]
    dims = {key: DIMS[key] for key in DIMS if any(key in spec.shape for spec in specs)}
    row: dict[str, Any] = {
        "name": name,
        "class": f"{entry.package}.{entry.name}".strip("."),
        "control": not entry.attention,
    }
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = Options(("onnx",), tolerance=TOLERANCE)
            inputs = {spec.name: spec for spec in specs}
            report = export(build(entry), inputs, f"{folder}/out", dims=dims, options=options).report
    except AdaAttnError as error:
        return row | {"verdict": "error", "reason": str(error), "seconds": time.perf_counter() - start}
    (target,) = report["targets"]
    measured = [output for output in target["outputs"] if output["error"] is not None and output["limit"]]
    worst = max(measured, key=lambda output: output["error"] / output["limit"], default=None)
    made = Counter(each["became"] for each in report["attentions"])
    return row | {
        "sites": len(report["attentions"]),
        "adaptive": made["adaptive_attention"],
        "left": sorted({each["reason"] for each in report["attentions"] if each["became"] is None}),
        "error": None if worst is None else worst["error"],
        "limit": None if worst is None else worst["limit"],
        "verdict": report["verdict"],
        "reason": target["reason"],
        "seconds": time.perf_counter() - start,
    }


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the text of docs/models.md."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "diffusers"))
    lines = [
        "# Models that were exported",
        "",
        "`python -m benchmarks.models` (`make models`) builds each model from a small random configuration, with no",
        f"edit of its source, exports it at a tolerance of {TOLERANCE:g}, and verifies it in ONNX Runtime on a CPU",
        f"({versions}; [models.json](../benchmarks/results/models.json)). An attention is replaced only where old and",
        "new agree in float64; what stays as it was, and why, is below the table. Error and limit are those of the",
        "output that comes closest to its limit. Controls have no attention. timm, torchvision and open_clip are not",
        "here: they need a torchvision that fits the CPU build of torch, and no wheel does.",
        "",
        "| model | class | attentions | adaptive | error | limit | verdict | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in rows:
        numbers = [f"{row[key]:.1e}" if row.get(key) is not None else "–" for key in ("error", "limit")]
        name = f"{row['name']} (control)" if row["control"] else row["name"]
        counts = [str(row.get(key, "–")) for key in ("sites", "adaptive")]
        cells = (name, f"`{row['class']}`", *counts, *numbers, row["verdict"], f"{row['seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- {row['name']}: {reason}." for reason in row.get("left", ())]
        if row["verdict"] != "passed" and row.get("reason"):
            notes.append(f"- {row['name']}: {row['reason']}.")
    total = sum(row.get("sites", 0) for row in rows), sum(row.get("adaptive", 0) for row in rows)
    passed = sum(row["verdict"] == "passed" for row in rows)
    lines += [
        "",
        f"In all {total[1]} of {total[0]} attentions are adaptive, and {passed} of {len(rows)} models passed.",
        "",
    ]
    return "\n".join([*lines, *notes]).rstrip() + "\n"


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    unknown = set(names) - set(MODELS)
    if unknown:
        raise click.UsageError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(MODELS)}")
    wanted, rows = names or tuple(MODELS), []
    say: Callable[[str], None] = click.echo
    for place, name in enumerate(wanted, 1):
        row = measure(name)
        rows.append(row)
        sites = f"{row.get('adaptive', '–')} of {row.get('sites', '–')} adaptive"
        seconds, reason = f"{row['seconds']:5.1f} s", row.get("reason") or ""
        say(f"{place:2}/{len(wanted)} {name:20} {row['verdict']:8} {sites:18} {seconds}  {reason}")
    passed, spent = sum(row["verdict"] == "passed" for row in rows), sum(row["seconds"] for row in rows)
    say(f"{passed} of {len(rows)} passed, {spent:.0f} s")
    if not names:
        (RESULTS / "models.json").write_text(json.dumps({"tolerance": TOLERANCE, "models": rows}, indent=1) + "\n")
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
