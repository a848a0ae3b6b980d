"""Describe a loaded model, and refuse those that cannot be exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.optim.swa_utils import AveragedModel

import adaattn.ops  # noqa: F401  a program that uses the ops loads only when they are registered
from adaattn.errors import ConfigError
from adaattn.input_spec import Dimension, InputSpec

EXPECTED = (
    "give a model.pt saved by adaattn.save, a .pt2 program, package.module:factory, or hf:FOLDER of Hugging Face "
    "transformers"
)
EXPERTS = "batched_mm"  # how transformers' mixtures of experts are computed: the usual ways loop over tokens
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


@dataclass(frozen=True)
class Source:
    """A loaded model and what its file says about its inputs, and about the tolerance of its attention."""

    model: nn.Module | ExportedProgram
    inputs: tuple[InputSpec, ...] = ()
    dims: tuple[Dimension, ...] = ()
    tolerance: float | None = None


def usable(model: object) -> nn.Module | ExportedProgram:
    """Return a model as torch.export can capture it, without the wrappers that only say where and how it runs.

    Mixtures of experts of transformers come back as a copy that computes them without loops.

    Raises:
        ConfigError: torch.export cannot capture it, or has weights that are not numbers in a tensor.
    """
    model = unwrapped(model)
    if isinstance(model, ExportedProgram):
        return model
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is a {type(model).__name__}; give an nn.Module or a torch.export.ExportedProgram")
    scripts = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripts:
        part = f"its part {scripts[0]}" if scripts[0] else "the model"
        raise ConfigError(
            f"{part} is a TorchScript module, of torch.jit.trace or torch.jit.script, which torch.export cannot "
            "capture; give the module that it was made from"
        )
    held = [*model.named_parameters(), *model.named_buffers()]
    packed = [(name, x) for name, x in model.state_dict().items() if isinstance(x, tuple)]  # of quantized modules
    held += [(name, x) for name, several in packed for x in several if isinstance(x, torch.Tensor)]
    for name, x in held:
        kind = kind_of(x)
        if kind is not None:
            raise ConfigError(f"weight {name} of {type(model).__name__} is a {kind[0]}; {kind[1]}")
    for module in model.modules():
        for name, x in vars(module).items():
            # What a call left behind, such as the weight that torch.nn.utils.weight_norm computes, cannot be copied
            # with the history that its gradient would need.
            if isinstance(x, torch.Tensor) and not x.is_leaf:
                vars(module)[name] = x.detach()
    if loops_over_experts(model):
        model = copy.deepcopy(model)
        for module in loops_over_experts(model):
            module.set_experts_implementation(EXPERTS)
    return model


def kind_of(x: torch.Tensor) -> tuple[str, str] | None:
    """Say why a tensor cannot be exported as a weight, and what to do; return None for an ordinary one."""
    if nn.parameter.is_lazy(x):
        return "parameter without a shape, of a lazy module", "run the module once on an example, which gives it one"
    if x.layout is not torch.strided:
        return "sparse tensor", "convert it by .to_dense()"
    if x.is_quantized:
        return "quantized tensor", "export the model as it was before it was quantized"
    if x.is_nested:
        return "nested tensor", "pad it by torch.nested.to_padded_tensor"
    if x.is_meta or isinstance(x, FakeTensor):
        return "tensor without numbers, of the meta device", "load its weights first, such as by --weights"
    return None


def loops_over_experts(model: nn.Module) -> list[Any]:
    """Return the mixtures of experts in a model of transformers whose graph depends on each expert's tokens."""
    modules: list[Any] = list(model.modules())
    settable = [module for module in modules if hasattr(module, "_can_set_experts_implementation")]
    return [
        module
        for module in settable
        if module._can_set_experts_implementation() and module.config._experts_implementation != EXPERTS
    ]


def unwrapped(model: object) -> object:
    """Return the module inside the wrappers of torch.compile and DataParallel."""
    if isinstance(model, WRAPPERS):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model  # of torch.compile
