"""Save and load model.pt: class, configuration, weights and inputs, in a format for `weights_only=True`."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

import adaattn
from adaattn.archive import SavedFile
from adaattn.attention.base import AttentionBase
from adaattn.checks import as_path, check_instance, check_mapping, described
from adaattn.errors import AdaAttnError, CheckpointError, ConfigError
from adaattn.input_spec import INT_MAX, Dimension, InputSpec
from adaattn.system.atomic_file import replacing

FORMAT, VERSION = "adaattn", 1
# Format 1.1 names classes as users do, `adaattn:Encoder`, so that modules can move; 1.0 named these modules.
CLASSES_OF_1_0 = {
    "adaattn.attention.adaptive:AdaptiveAttention": "adaattn:AdaptiveAttention",
    "adaattn.attention.adaptive_precision:AdaptivePrecisionAttention": "adaattn:AdaptivePrecisionAttention",
    "adaattn.attention.adaptive_rank:AdaptiveRankAttention": "adaattn:AdaptiveRankAttention",
    "adaattn.attention.dense:DenseAttention": "adaattn:DenseAttention",
    "adaattn.encoder:Encoder": "adaattn:Encoder",
}
SPARE_COUNT, SPARE_NUMBERS = 1000, 2**22  # so that of small models `load_state_dict` says what does not fit
TOO_LARGE = "its configuration asks for more weights than the file holds"
OTHER = "is not a model saved by adaattn.save"
MOST_ITEMS, LONGEST_TEXT = 10_000, 1000  # in a configuration; characters of a text, bits of a number
FIELDS = {"class": str, "config": dict, "state": dict, "training": bool, "inputs": dict, "dims": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A model.pt as read: the module, and what was saved about its inputs."""

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    dims: tuple[Dimension, ...]


def save(
    module: nn.Module,
    path: str | os.PathLike[str],
    inputs: Mapping[str, str | Tensor] | None = None,
    dims: Mapping[str, str] | None = None,
) -> None:
    """Save a module so that `adaattn.load` and `adaattn-export` can build it again.

    Args:
        module: an instance of a class whose every constructor argument is an attribute of the same name, as in all
            modules of this package.
        path: the file; it appears whole or not at all.
        inputs: for each argument of forward a specification such as "B,S,512:float32", or an example tensor.
        dims: for each name in them the sizes it may take, such as "1:128:4096" (min:opt:max).

    Example:
        >>> save(adaattn.DenseAttention(64, 4), "model.pt", inputs={n: "B,S,64" for n in ("query", "key", "value")})

    Raises:
        CheckpointError: the module's class or configuration cannot be written, or the file cannot.
        ConfigError: a specification that cannot be read, or an argument of another class.
    """
    check_instance("module", module, nn.Module, "a torch.nn.Module")
    path = as_path("path", path)
    check_mapping(
        "inputs", {} if inputs is None else inputs, (str, Tensor), "a specification such as 'B,S,512:float32'"
    )
    check_mapping("dims", {} if dims is None else dims, (str,), "sizes such as '1:128:4096'")
    specs = [_spec(name, given) for name, given in (inputs or {}).items()]
    sizes = [Dimension.parse(name, given) for name, given in (dims or {}).items()]
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "class": _class_name(module),
        "config": _config(module),
        "attention": _attention(module),
        "state": dict(module.state_dict()),
        "training": module.training,
        "inputs": {spec.name: str(spec) for spec in specs},
        "dims": {dimension.name: str(dimension) for dimension in sizes},
    }
    write_whole(payload, path)


def write_whole(payload: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Call `torch.save` on a file that appears whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with replacing(Path(path)) as file:
            torch.save(payload, file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:
        # torch's writer answers a full disk with an error of its own, behind which the system's stands
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise CheckpointError(f"{path} cannot be written: {cause.strerror or cause}") from error
        raise


def load(path: str | os.PathLike[str], classes: Sequence[type[nn.Module]] = ()) -> nn.Module:
    """Return the module of a file that `save` wrote.

    Args:
        path: the file.
        classes: your own classes that it may hold; those of this package need no mention.

    Example:
        >>> load("model.pt")
        DenseAttention(...)

    Raises:
        CheckpointError: no such file, or one that is not, or not wholly, a model of this format.
    """
    return read(path, classes).module


def read(path: str | os.PathLike[str], classes: Sequence[type[nn.Module]] = ()) -> Checkpoint:
    """Return the model as `load` does, and the saved inputs."""
    path = as_path("path", path)
    if not isinstance(classes, Iterable) or not all(isinstance(kind, type) for kind in classes):
        raise ConfigError(f"classes is {described(classes)}; give a list of classes of torch.nn.Module")
    try:
        file = SavedFile(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} {OTHER}: it {error}") from error
    try:
        return from_file(file, classes)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error


def is_payload(loaded: object) -> bool:
    """Return whether what `torch.load` returned was written by `save`."""
    return isinstance(loaded, dict) and loaded.get("format") == FORMAT


def from_file(file: SavedFile, classes: Sequence[type[nn.Module]] = ()) -> Checkpoint:
    """Return the checkpoint in a file.

    Its weights are read last, when the module is known to take weights of such shapes, so that they are held once.

    Raises:
        CheckpointError: it is none, of another version, of an unknown class, or incomplete; a predicate whose subject
            is the path.
    """
    try:
        payload = file.outline
    except CheckpointError as error:
        raise CheckpointError(f"{OTHER}: it {error}") from error
    if not is_payload(payload):
        raise CheckpointError(f"{OTHER}; it holds a {type(payload).__name__}")
    version = payload.get("version")
    if type(version) is not int or version != VERSION:  # a tensor compares to a tensor
        raise CheckpointError(
            f"has format version {_short(version)} and this release reads version {VERSION}; "
            "save the model again, or install the release that wrote it"
        )
    damaged = [name for name, kind in FIELDS.items() if not isinstance(payload.get(name), kind)]
    if not damaged:
        texts = [*payload["inputs"].items(), *payload["dims"].items()]
        sound = {
            "class": len(payload["class"]) <= LONGEST_TEXT,
            "config": all(isinstance(name, str) for name in payload["config"])
            and _items(list(payload["config"].values())) <= MOST_ITEMS,
            "inputs": all(isinstance(text, str) and len(text) <= LONGEST_TEXT for pair in texts for text in pair),
        }
        damaged = [name for name, good in sound.items() if not good]
    if damaged:
        raise CheckpointError(f"is damaged: its {damaged[0]!r} is missing or of another type; save it again")
    known = _find_class(payload["class"], classes)
    try:
        state = payload["state"]
        with at_most(len(state), sum(x.numel() for x in state.values() if isinstance(x, Tensor))):
            module = known(**payload["config"])
            _set_attention(module, payload.get("attention", {}), classes)
        inputs = tuple(InputSpec.parse(name, text) for name, text in payload["inputs"].items())
        dims = tuple(Dimension.parse(name, text) for name, text in payload["dims"].items())
    except Exception as error:  # of the class, which may be the user's, on what the file says
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        cause = error.__cause__ or error
        if not isinstance(cause, AdaAttnError) and any(word in str(cause) for word in ("allocate", "overflow")):
            reason = TOO_LARGE  # before the first parameter was
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        raise CheckpointError(f"is inconsistent: {reason}") from error
    # The module's own random weights go before the file's come.
    assign_weights(module, payload["state"], known.__name__)
    assign_weights(module, file.load()["state"], known.__name__)
    module.train(payload["training"])
    return Checkpoint(module, inputs, dims)


@contextmanager
def at_most(count: int, numbers: int) -> Iterator[None]:
    """Let this thread make modules with about so many parameters, and numbers in them, no more.

    A few bytes of configuration can ask for a module larger than all memory.
    """
    count, numbers = count + SPARE_COUNT, numbers + SPARE_NUMBERS
    here = threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, numbers
        if parameter is None or threading.get_ident() != here:
            return
        count, numbers = count - 1, numbers - parameter.numel()
        if min(count, numbers) < 0:
            raise CheckpointError(TOO_LARGE)

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


def assign_weights(module: nn.Module, state: Mapping[str, Any], name: str) -> None:
    """Assign the file's tensors and their types to a module, instead of copying them as `load_state_dict` does.

    What is one tensor under several names in the module is one afterwards, whether the file has all its names or one.

    Raises:
        CheckpointError: they do not fit; a predicate for which the file's name is the subject.
    """
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError("is not a state dict: keys must be strings")
    state = dict(state)
    for key, own in module.state_dict().items():
        x = state.get(key)
        if not isinstance(x, Tensor) or not isinstance(own, Tensor) or x.dtype == own.dtype:
            continue
        if x.is_floating_point() != own.is_floating_point() or x.is_complex() != own.is_complex():
            raise CheckpointError(f"does not fit {name}: {key} is {x.dtype} in the file and {own.dtype} in the model")
        if not x.is_floating_point() and not x.is_complex():
            state[key] = x.to(own.dtype)  # masks and counters
    tied = _tied_names(module)
    for names in tied:
        known = [key for key in names if key in state]
        for other in known[1:]:
            if not _same(state[known[0]], state[other]):
                raise CheckpointError(
                    f"does not fit {name}: {known[0]} and {other} are one tensor there, and two that differ in the file"
                )
        state |= {key: state[known[0]] for key in names if known}
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        # Each line is a list of keys, maybe of all: one of missing ones, one of unexpected ones, then wrong shapes.
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        shown = " ".join(line if len(line) <= 200 else line[:197] + "..." for line in lines)
        raise CheckpointError(f"does not fit {name}: {shown}") from error
    for first, *others in tied:
        owner, _, leaf = first.rpartition(".")
        one = getattr(module.get_submodule(owner), leaf)
        for other in others:
            owner, _, leaf = other.rpartition(".")
            setattr(module.get_submodule(owner), leaf, one)


def _tied_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter or buffer that has several."""
    names: dict[int, list[str]] = {}
    for key, x in module.state_dict(keep_vars=True).items():
        if isinstance(x, Tensor):
            names.setdefault(id(x), []).append(key)
    return [same for same in names.values() if len(same) > 1]


def _same(one: Any, other: Any) -> bool:
    """Return whether two tensors of a file hold the same numbers, NaN included; of meta tensors, whether they could."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_meta or other.is_meta or (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _spec(name: str, given: str | Tensor) -> InputSpec:
    if isinstance(given, str):
        return InputSpec.parse(name, given)
    return InputSpec(name, tuple(given.shape), str(given.dtype).removeprefix("torch."))


def _config(module: nn.Module) -> dict[str, Any]:
    config = {}
    for name in inspect.signature(type(module)).parameters:
        if not hasattr(module, name):
            raise CheckpointError(
                f"{type(module).__name__} has no attribute {name!r}; keep each constructor argument as an attribute of "
                "the same name, or export with package.module:factory and --weights"
            )
        config[name] = getattr(module, name)
        if not _plain(config[name]):
            raise CheckpointError(
                f"{type(module).__name__}.{name} is a {type(config[name]).__name__}; only numbers, texts, booleans, "
                "None and lists of them can be saved"
            )
    return config


def _attention(module: nn.Module) -> dict[str, Any]:
    """Return class and configuration of each attention of this package within a module, by all its names.

    They may have been set, or replaced, after the module's constructor made them.
    """
    return {
        name: {"class": _class_name(each), "config": _config(each)}
        for name, each in module.named_modules(remove_duplicate=False)
        if name and isinstance(each, AttentionBase) and type(each).__module__.startswith("adaattn.")
    }


def _set_attention(module: nn.Module, saved: Any, classes: Sequence[type[nn.Module]]) -> None:
    """Put in place each attention that is not as it was saved.

    Raises:
        CheckpointError: a predicate for which the file's name is the subject.
    """
    if not isinstance(saved, dict):
        raise CheckpointError("is damaged: its 'attention' is of another type; save it again")
    if saved == _attention(module):
        return
    made = dict[nn.Module, nn.Module]()  # by what it replaces: one module may have several names
    for name, each in saved.items():
        if not isinstance(name, str) or not isinstance(each, dict) or not isinstance(each.get("class"), str):
            raise CheckpointError("is damaged: its 'attention' is of another form; save it again")
        before = module.get_submodule(name)
        if before not in made:
            made[before] = _find_class(each["class"], classes)(**each["config"])
        parent, _, child = name.rpartition(".")
        module.get_submodule(parent).register_module(child, made[before])


def _class_name(module: nn.Module) -> str:
    """Return the public name of a class of this package, and `module:qualname` of any other."""
    kind = type(module)
    public = f"adaattn:{kind.__qualname__}"
    if public in CLASSES_OF_1_0.values() and getattr(adaattn, kind.__qualname__) is kind:
        return public
    return f"{kind.__module__}:{kind.__qualname__}"


def _plain(value: object) -> bool:
    return _items([value]) <= MOST_ITEMS


def _items(values: list[Any]) -> int:
    """Count the numbers, texts, booleans and None in nested lists; MOST_ITEMS + 1 for more, or for other types.

    A list that holds another twice, which holds another twice, is small in a file and endless to go through.
    """
    left, count = list(values), 0
    while left and count <= MOST_ITEMS:
        value = left.pop()
        count += 1
        if isinstance(value, (list, tuple)):
            left += value[: MOST_ITEMS + 1]
        elif not (value is None or isinstance(value, (bool, float))):
            size = len(value) if isinstance(value, str) else value.bit_length() if isinstance(value, int) else INT_MAX
            count += 0 if size <= LONGEST_TEXT else MOST_ITEMS
    return count + len(left)


def _short(value: object) -> str:
    return repr(value) if _items([value]) <= 3 else f"of type {type(value).__name__}"


def _find_class(name: str, classes: Sequence[type[nn.Module]]) -> type[nn.Module]:
    """Return a class by its name: one that the caller names, or one of this package. Nothing else is imported."""
    for known in classes:
        if name == f"{known.__module__}:{known.__qualname__}":
            return known
    public = CLASSES_OF_1_0.get(name, name)
    if public in CLASSES_OF_1_0.values():
        found: type[nn.Module] = getattr(adaattn, public.removeprefix("adaattn:"))
        return found
    raise CheckpointError(
        f"holds a {name}, which is not a class of this package; pass it to adaattn.load(classes=[…]), or export with "
        "package.module:factory and --weights"
    )
