"""Load a local folder of Hugging Face transformers as a model with named input and output tensors."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adaattn import archive
from adaattn.checkpoint import at_most
from adaattn.errors import CheckpointError, ConfigError
from adaattn.export.sources import sentence_pooling
from adaattn.export.sources.source import EXPERTS, Source, loops_over_experts
from adaattn.input_spec import Dimension, InputSpec
from adaattn.integrations.transformers import register_calibration
from adaattn.integrations.transformers.registry import SETTING

LONGEST = 512  # tokens, where the model does not say
ELSE = "describe the model by package.module:factory and --input"


class HuggingFaceModel(nn.Module):
    """The tensors that a model of transformers returns, by their names; without caches."""

    def __init__(self, model: nn.Module, pooling: sentence_pooling.Pooling | None = None) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        takes = inspect.signature(model.forward).parameters
        self.options = {"return_dict": True} | ({"use_cache": False} if "use_cache" in takes else {})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Call the model with the inputs that are given; return its tensors, or the pooled sentence embedding."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "decoder_input_ids": decoder_input_ids,
            "pixel_values": pixel_values,
        }
        outputs = self.model(**{name: x for name, x in given.items() if x is not None}, **self.options)
        if self.pooling is not None:
            assert attention_mask is not None  # described by inputs_of for every sentence encoder
            return {"sentence_embedding": self.pooling(outputs["last_hidden_state"], attention_mask)}
        found = {name: x for name, x in outputs.items() if isinstance(x, Tensor)}
        for name, several in outputs.items():  # hidden states, where the config asks for them
            if isinstance(several, tuple):
                found |= {f"{name}_{place}": x for place, x in enumerate(several) if isinstance(x, Tensor)}
        return found


def load(folder: Path, allow_pickle: bool = False) -> Source:
    """Return the model of a folder with config.json and weights, and its inputs.

    A folder of sentence-transformers, which has modules.json, becomes its sentence embedding.

    Raises:
        CheckpointError: the folder is not such a model, or needs code or pickles that it carries.
        ConfigError: transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
    try:
        register_calibration()
    except ImportError as error:
        raise ConfigError("transformers is missing or too old: pip install 'adaattn[transformers]'") from error
    if not allow_pickle and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no weights in safetensors; pickled ones are read only with --allow-pickle; or save them "
            "anew by save_pretrained"
        )
    pooling = sentence_pooling.pooling_of(folder)
    model: Any = _from_pretrained(folder, allow_pickle, pooled=pooling is not None)
    inputs = inputs_of(model, folder)
    longest = longest_of(model)
    dims = tuple(Dimension(name, 1, min(128, longest), longest) for name in ("S", "T"))
    tolerance = getattr(model.config, SETTING, None)
    return Source(HuggingFaceModel(model, pooling).eval(), inputs, dims, tolerance)


def inputs_of(model: Any, folder: Path) -> tuple[InputSpec, ...]:
    """Return the inputs of the model's task: tokens with their mask, or an image."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    kinds = [kind for kind in ("input_ids", "pixel_values", "input_values", "input_features") if kind in takes]
    if kinds == ["pixel_values"]:
        size = getattr(config, "image_size", None)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if not isinstance(height, int) or not isinstance(width, int):
            raise CheckpointError(f"{folder}/config.json names no image_size; {ELSE}")
        return (InputSpec("pixel_values", ("B", getattr(config, "num_channels", 3), height, width)),)
    if kinds != ["input_ids"] or "attention_mask" not in takes:
        raise CheckpointError(
            f"{folder} is a {type(model).__name__}, which takes {', '.join(kinds) or 'none of the usual inputs'}; text "
            f"with its attention_mask, or images alone, are known here: {ELSE}"
        )
    words = config.get_text_config().vocab_size
    specs = [
        InputSpec("input_ids", ("B", "S"), "int64", words),
        InputSpec("attention_mask", ("B", "S"), "int64", 2),
    ]
    segments = getattr(config, "type_vocab_size", 0)
    if "token_type_ids" in takes and segments > 1:
        specs.append(InputSpec("token_type_ids", ("B", "S"), "int64", segments))
    if "decoder_input_ids" in takes:
        specs.append(InputSpec("decoder_input_ids", ("B", "T"), "int64", words))
    return tuple(specs)


def longest_of(model: Any) -> int:
    """Return the longest sequence: the size of the table of positions, at most LONGEST."""
    table = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    for name, module in model.named_modules():
        # As in RoBERTa: positions are counted from behind the padding's own.
        positions = isinstance(module, nn.Embedding) and "position" in name and module.num_embeddings == table
        if positions and module.padding_idx is not None:
            table -= module.padding_idx + 1
            break
    return min(int(table), LONGEST)


def _from_pretrained(folder: Path, allow_pickle: bool, pooled: bool) -> nn.Module:
    import transformers

    version = f"transformers {transformers.__version__}"
    try:
        content = json.loads((folder / "config.json").read_bytes())
        kind, names = str(content.get("model_type")), content.get("architectures") or []
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/config.json is not a config of transformers: {error}") from error
    if kind not in transformers.CONFIG_MAPPING:
        code = "; it brings its own code, which is never run here" if "auto_map" in content else ""
        raise CheckpointError(f"{folder} is a {kind!r}, unknown to {version}{code}; {ELSE}")
    try:
        architecture: Any = getattr(transformers, names[0], None) if names else None
        if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
            architecture = transformers.AutoModel
        if pooled:  # hidden states, whatever head the weights were saved with; of T5 those of its encoder
            prefix = transformers.CONFIG_MAPPING[kind].__name__.removesuffix("Config")
            architecture = getattr(transformers, f"{prefix}EncoderModel", transformers.AutoModel)
        with _without_progress(), at_most(2 * _weights_in(folder), sys.maxsize):
            model, found = architecture.from_pretrained(
                str(folder),
                # Only the eager implementation returns weights; otherwise transformers chooses.
                attn_implementation="eager" if content.get("output_attentions") else None,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and torch each have errors of their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, KeyError):  # says no more than the key
            lines[0] = f"KeyError: {lines[0]}"
        line = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
        if "ignore_mismatched_sizes" in line:  # what does not fit, transformers logs
            line = "its weights have other sizes than config.json says"
        raise CheckpointError(f"{folder} cannot be loaded by {version}: {line}") from error
    missing = sorted(found["missing_keys"])
    if pooled:
        missing = [key for key in missing if "pooler." not in key]
    if missing:
        raise CheckpointError(
            f"{folder} lacks weights of {type(model).__name__}, such as {missing[0]}, which would be random; save the "
            "model that config.json names in its architectures"
        )
    assert isinstance(model, nn.Module)
    for module in loops_over_experts(model):
        module.set_experts_implementation(EXPERTS)
    for x in (*model.parameters(), *model.buffers()):
        x.data = x.data.clone()  # mapped from the file, they would crash the process when someone truncates it
    return model


def _weights_in(folder: Path) -> int:
    """Count the tensors in a folder's safetensors; pickled weights, which need permission, may have any number."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    count = 0
    for path in files:
        archive.regular(path)
        with safe_open(path, framework="pt") as file:
            count += len(file.keys())
    return count if files else sys.maxsize // 2 - 1


@contextmanager
def _without_progress() -> Iterator[None]:
    """Keep transformers' bars from the console: the command has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
