"""Small random models of Hugging Face transformers, one of each kind that attention is called by."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: nothing here needs a network

WORDS, LONGEST = 99, 40
# Weights so large that attention is far from uniform, and its errors are seen at the outputs.
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"vocab_size": WORDS, "max_position_embeddings": LONGEST, "initializer_range": 0.3},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LAYERS_OF_TWO: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": WORDS, "init_std": 0.3},
    **{"max_position_embeddings": LONGEST, "decoder_start_token_id": 2},
}
CONFIGS: dict[str, tuple[type, Any]] = {
    "bert": (hf.BertModel, hf.BertConfig(**SIZES)),
    "roberta": (hf.RobertaModel, hf.RobertaConfig(**SIZES)),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig(
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            vocab_size=WORDS,
            max_position_embeddings=LONGEST,
            initializer_range=0.3,
        ),
    ),
    "modernbert": (
        hf.ModernBertModel,
        hf.ModernBertConfig(**SIZES, local_attention=8, global_attn_every_n_layers=2, cls_token_id=0, sep_token_id=2),
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=LONGEST, vocab_size=WORDS, initializer_range=0.3),
    ),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**GROUPED, sliding_window=5)),
    "qwen2": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=24,
            patch_size=8,
            initializer_range=0.3,
        ),
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=WORDS, decoder_start_token_id=0),
    ),
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**LAYERS_OF_TWO)),
}
for _, _config in CONFIGS.values():  # defaults of the classes lie outside so small a vocabulary
    _config.bos_token_id, _config.pad_token_id, _config.eos_token_id = 0, 1, 2


def build(name: str, implementation: str, like: nn.Module | None = None, **changes: Any) -> Any:
    """Return a model in eval mode, with the weights of another where one is given."""
    cls, config = CONFIGS[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    model = cls._from_config(config, attn_implementation=implementation).eval()  # type: ignore[attr-defined]
    if like is not None:
        model.load_state_dict(like.state_dict())
    return model


def inputs(name: str, batch: int, length: int, padding: str = "none") -> dict[str, Tensor]:
    """Return inputs of the model; with padding, all sequences but the first lack a third of their tokens."""
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 24, 24)}
    given = {"input_ids": torch.randint(3, WORDS, (batch, length))}
    if padding != "none":
        mask = torch.ones(batch, length, dtype=torch.int64)
        absent = length // 3
        mask[1:, :absent] = 0 if padding == "left" else 1
        mask[1:, length - absent :] = 0 if padding == "right" else 1
        given["attention_mask"] = mask
    if name in ("t5", "bart"):
        given["decoder_input_ids"] = torch.randint(3, WORDS, (batch, length // 2 + 1))
    return given


def shown(name: str, output: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Return the outputs of tokens that are there: what padding gets, nobody defines."""
    mask = given.get("attention_mask")
    return output if mask is None or name in ("t5", "bart") else output[mask.bool()]
