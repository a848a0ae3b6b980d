"""Each wrong input of `adaattn-export`: one line that says what, why and what to do; status 2; nothing left behind.

One file, though long: it is one table of wrong inputs, with the few models that they need.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaattn.errors import ExportError
from adaattn.export.capture.module import capture_module
from adaattn.input_spec import InputSpec
from tests.support.bad_files import PROGRAM_TRAPS, build_shelf, read_records, write_records
from tests.support.cli import refused, run

QUICK = ("-q", "--target", "onnx", "--no-verify")
REMEDY = "give a model.pt saved by adaattn.save, a .pt2 program, package.module:factory, or hf:FOLDER"
PROGRAM = ("only load by running code that the file carries", "nothing of it has been read", "--allow-pickle")
DANGER = ("runs whatever code it carries", "--allow-pickle", "adaattn.save", "as weights for package.module:factory")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(autouse=True)
def nothing_left_behind(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, which must be as empty afterwards; the shelf must be as it was."""
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(shelf))
    path = list(sys.path)
    yield
    assert os.listdir(tmp_path) == []
    assert sorted(os.listdir(shelf)) == before
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.pt", ["does not exist", REMEDY]),
        ("none.pt2", ["does not exist", REMEDY]),
        ("empty.pt", ["is empty", REMEDY]),
        ("empty.pt2", ["is empty", REMEDY]),
        ("folder", ["is a folder", REMEDY]),
        *((f"{name}.pt", ["damaged or of another kind", REMEDY]) for name in ("half", "header", "text", "noise")),
        ("photos.pt", ["damaged or of another kind", REMEDY]),
        ("pickle_noise.pt", ["damaged or of another kind", REMEDY]),
        *((f"{name}.pt2", PROGRAM) for name in ("good", "half", "header", "text", "noise", "photos")),
        ("program.pt", ["is a program saved by torch.export.save", "give its name the ending .pt2"]),
        ("tensor.pt", ["holds a Tensor, not a model", REMEDY]),
        ("list.pt", ["holds a list, not a model", REMEDY]),
        ("training.pt", ["holds a dict, not a model", REMEDY]),
        ("weights.pt", ["weights without a model", "package.module:factory --weights"]),
        ("script.pt", ["TorchScript", REMEDY]),
        ("module.pt", DANGER),
        ("old_module.pt", DANGER),
        ("trap.pt", DANGER),
        ("plain.pkl", DANGER),
        ("version.pt", ["format version 99", "reads version 1", "save the model again"]),
        ("no_version.pt", ["format version None", "save the model again"]),
        ("class.pt", ["shop.models:Ranker", "not a class of this package", "package.module:factory"]),
        ("not_ours.pt", ["os:system", "not a class of this package"]),
        ("no_config.pt", ["'config' is missing", "save it again"]),
        ("config.pt", ["embed_dim 17 is not a positive multiple of num_heads 2"]),
        ("missing.pt", ["does not fit Encoder", 'Missing key(s) in state_dict: "stack.0.attention_norm.weight"']),
        ("more.pt", ["does not fit Encoder", 'Unexpected key(s) in state_dict: "more"']),
        ("shape.pt", ["does not fit Encoder", "attention_norm.weight", "Size([3])", "Size([16])"]),
        ("other_input.pt", ["no input 'y'", "Encoder.forward takes (x, attention_mask)"]),
    ],
)
def test_files_that_are_no_models(name: str, words: list[str], shelf: Path) -> None:
    result = run(shelf / name, *QUICK)
    refused(result, *words)
    assert name in result.stderr or name == "other_input.pt"


@pytest.mark.parametrize("trap", PROGRAM_TRAPS)
def test_a_program_runs_code_only_with_permission(
    trap: str, shelf: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("trap")
    records = read_records(shelf / "good.pt2")
    PROGRAM_TRAPS[trap](records)
    write_records(records, folder / "trap.pt2")
    write_records(records, folder / "trap.pt")
    refused(run(folder / "trap.pt2", *QUICK), *PROGRAM)
    for permission in ((), ("--allow-pickle",)):
        refused(run(folder / "trap.pt", *QUICK, *permission), "give its name the ending .pt2")
    assert not Path("sprung").exists()
    with contextlib.suppress(Exception):  # it is a trap: torch springs it, and may go on
        torch.export.load(folder / "trap.pt2").module()(torch.ones(3, 16))
    Path("sprung").rmdir()


def _emptied(records: Any) -> None:
    records["good/data/weights/weight_0"] = b""


def _left_out(records: Any) -> None:
    del records["good/data/weights/weight_1"]


def _shortened(records: Any) -> None:
    records["good/data/weights/weight_0"] = records["good/data/weights/weight_0"][:40]


def _two_programs(records: Any) -> None:
    records["good/models/other.json"] = records["good/models/model.json"]


def _compiled(records: Any) -> None:
    records["good/data/aotinductor/model/model.so"] = b"\x7fELF"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_emptied, ["is damaged or was saved without numbers: those of weight are missing"]),
        (_left_out, ["is damaged or was saved without numbers: those of bias are missing"]),
        (_shortened, ["is not a program saved by torch.export.save: it is damaged"]),
        (_two_programs, ["holds the programs model, other; save one alone"]),
        (_compiled, ["holds a library that AOTInductor compiled"]),
        (lambda records: records.clear(), ["holds no program of torch.export.save"]),
    ],
)
def test_a_program_that_is_not_whole(
    change: Any, words: list[str], shelf: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("program") / "program.pt2"
    records = read_records(shelf / "good.pt2")
    change(records)
    write_records(records, path)
    refused(run(path, *QUICK, "--allow-pickle"), *words)


def test_a_program_with_a_wrong_bit(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("program") / "program.pt2"
    data = bytearray((shelf / "good.pt2").read_bytes())
    weight = read_records(shelf / "good.pt2")["good/data/weights/weight_0"]
    data[data.index(weight) + 7] ^= 1
    path.write_bytes(data)
    refused(run(path, *QUICK, "--allow-pickle"), "is damaged: the checksum of its record 'weight_0' is wrong")


@pytest.mark.parametrize("ending", ["pt", "pt2", "safetensors"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, ["is a device or a pipe, not a file"]),
        (lambda path: path.symlink_to("/dev/zero"), ["is a device or a pipe, not a file"]),
        (lambda path: path.symlink_to(path.name), ["cannot be read: Too many levels of symbolic links"]),
        (lambda path: path.symlink_to("nowhere"), ["does not exist"]),
        (os.mkdir, ["is a folder"]),
    ],
)
def test_paths_that_are_no_files(
    make: Any, words: list[str], ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("odd") / f"a\n\x1b[31m.{ending}"
    make(path)
    source = ["tests.support.models:linear", "--weights", path] if ending == "safetensors" else [path, "--allow-pickle"]
    refused(run(*source, *QUICK), f"a \\x1b[31m.{ending}", *words)


@pytest.mark.parametrize("name", ["noise.pt", "pickle_noise.pt", "text.pt", "photos.pt"])
def test_permission_to_unpickle_makes_no_model_of_noise(name: str, shelf: Path) -> None:
    refused(run(shelf / name, *QUICK, "--allow-pickle"), "damaged or of another kind", REMEDY)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("none.safetensors", ["does not exist", "state dict"]),
        ("no_bias.safetensors", ["does not fit tests.support.models:linear", 'Missing key(s) in state_dict: "bias"']),
        ("more.safetensors", ['Unexpected key(s) in state_dict: "more"']),
        ("prefix.safetensors", ['Missing key(s) in state_dict: "weight", "bias"', '"module.bias", "module.weight"']),
        (
            "narrow.safetensors",
            ["does not fit tests.support.models:linear", "size mismatch for weight", "[8, 15]", "[8, 16]"],
        ),
        ("noise.safetensors", ["damaged or of another kind", "state dict"]),
        ("noise.pt", ["damaged or of another kind", "state dict"]),
        ("empty.pt", ["damaged or of another kind", "state dict"]),
        ("folder", ["is a folder", "state dict"]),
        ("module.pt", ["holds objects that only code can make, not weights alone", "state dict"]),
        ("list.pt", ["holds a list, not weights by name", "state dict"]),
        ("numbered.pt", ["not a state dict"]),
        ("texts.pt", ["does not fit tests.support.models:linear", "<class 'str'>"]),
        ("training.pt", ['Unexpected key(s) in state_dict: "state_dict", "epoch"']),
    ],
)
def test_weights_that_do_not_fit_the_factory(weights: str, words: list[str], shelf: Path) -> None:
    refused(
        run("tests.support.models:linear", "--weights", shelf / weights, "--input", "input=B,16", *QUICK),
        weights,
        *words,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("no_such_module:f", ["no module named 'no_such_module'", "install it"]),
        ("tests.support.models.part:f", ["no module named 'tests.support.models.part'"]),
        ("tests.support.models:no_such_name", ["module 'tests.support.models' has no attribute 'no_such_name'"]),
        ("tests.support.models:", ["neither an existing file", "package.module:factory"]),
        (":tiny", ["neither an existing file", "package.module:factory"]),
        ("..models:tiny", ["package.module:factory"]),
        ("models/foreign.py:tiny", ["neither an existing file", "package.module:factory", "models.foreign:tiny"]),
        ("gpt.py:model", ["no module named 'gpt", "a function of that file is named gpt:model"]),
        ("tests.support.models:fails", ["tests.support.models:fails raised RuntimeError: the shop is closed"]),
        ("tests.support.models:leaves", ["tests.support.models:leaves raised SystemExit: 3"]),
        ("tests.support.models:lacks_a_package", ["it imports what is missing: no module named 'no_such_package'"]),
        (
            "tests.support.models:lacks_something",
            ["tests.support.models:lacks_something raised ModuleNotFoundError: install the shop first"],
        ),
        (
            "tests.support.models:errs",
            ["tests.support.models:errs raised AttributeError: 'int' object has no attribute 'shape'"],
        ),
        ("tests.support.models:number", ["returned a int", "must return an nn.Module"]),
        ("tests.support.models:wants_an_argument", ["TypeError", "missing 1 required positional argument: 'width'"]),
        ("tests.support.models:an_instance", ["is a Linear; name a function that returns it"]),
        (
            "tests.support.models:Add",
            ["inputs of Add are not described", "forward takes (x, y)", '--input "x=B,S,512:float32"'],
        ),
        ("tests.support.models:Add --input z=B,S,16", ["no input 'z'", "Add.forward takes (x, y)"]),
        ("tests.support.models:Add --input x=B,S,16", ["input 'y' is not described", "Add.forward takes (x, y)"]),
        ("tests.support.models:Options --input x=B,16 --input y=B,16", ["no input 'y'", "takes (x, **options)"]),
        (
            "tests.support.models:Flat --input x=B,4,15",
            ["x (B=3, 4, 15:float32)", "(3x60 and 64x8)", "correct the inputs"],
        ),
        (
            "tests.support.models:Flat --input x=B,S,16 --dim S=4:4:8",
            ["fixes dimension S to 4; write 4 in its place in --input"],
        ),
        ("tests.support.models:Flat --input x=B,S,16", ["fixes dimension S to 4; write 4 in its place in --input"]),
        ("tests.support.models:Flat --input x=B,S,8", ["fixes dimension S to 8; write 8 in its place in --input"]),
        (
            "tests.support.models:Flat --input x=B,S,7",
            ["(3x28 and 64x8)", "x (B=3, S=4, 7:float32)", "fixes is a number"],
        ),
        (
            "tests.support.models:Rows --input x=B,S,7 --dim S=3:5:7",
            ["'[-1, 64]' is invalid for input of size", "fixes is a number"],
        ),
        (
            "tests.support.models:Pairs --input x=B,S,8 --dim S=1:4:9",
            ["takes S from 2 to 9, not 1:4:9", "--dim S=2:4:9"],
        ),
        (
            "tests.support.models:Tagger --input ids=B,S:int64<100 --dim S=1:128:512",
            ["takes S from 1 to 16, not 1:128:512", "--dim S=1:16:16"],
        ),
        (
            "tests.support.models:Add --input x=B,S,8 --input y=B,T,8",
            ["y (B=3, T=5, 8:float32)", "that must agree share a name"],
        ),
        (
            "tests.support.models:Next --input x=B,S,8 --input y=B,T,8 --dim S=4:4:9 --dim T=5:5:12",
            ["takes T from 5 to 10 where S is 4:4:9", "--dim T=5:5:10"],
        ),
        ("tests.support.models:Lookup --input x=B,S", ["the model does not run", "KeyError: 'b'"]),
        (
            "tests.support.models:scripted --input input=B,16",
            ["is a TorchScript module", "give the module that it was made from"],
        ),
        (
            "tests.support.models:traced --input input=B,16",
            ["is a TorchScript module", "give the module that it was made from"],
        ),
        (
            "tests.support.models:on_meta --input input=B,16",
            ["is a tensor without numbers, of the meta device", "load its weights first"],
        ),
        (
            "tests.support.models:lazy --input input=B,16",
            ["is a parameter without a shape, of a lazy module", "run the module once"],
        ),
        (
            "tests.support.models:Dropping --input x=B,S,16",
            ["dropout_p=0.5 in evaluation mode", "unless self.training is true"],
        ),
        (
            "tests.support.models:Halves --input x=B,S,16",
            ["at one size of dimension S alone", "write the size that you need"],
        ),
        ("tests.support.models:Branch --input x=B,S", ["cannot capture", "data-dependent", "models.py:"]),
        ("tests.support.models:Nothing --input x=B,S", ["the model returns no tensor"]),
        ("tests.support.models:tiny --input x=B,S", ["x (B=3, S=4:float32)", "correct the inputs"]),
        (
            "tests.support.models:tiny --input x=B,S,16:int64",
            ["x (B=3, S=4, 16:int64)", "expected a floating-point tensor", "correct the inputs"],
        ),
        ("tests.support.models:tiny --input x=B,S,16:float16", ["x is torch.float16 and the module torch.float32"]),
        (
            "tests.support.models:tiny --input x=B,S,16 --input attention_mask=B,T",
            ["mask has shape (3, 5); expected (batch, keys)"],
        ),
        ("tests.support.models:tiny --input x=B,S,0", ["a size is 0", "x=B,S,0"]),
        ("tests.support.models:tiny --input x=B,S,16:float99", ["'float99' is unknown", "float32"]),
        ("tests.support.models:tiny --dim S=5:3:9", ["S=5:3:9", "in order"]),
        ("tests.support.models:tiny --dim S=1:2", ["S=1:2", "write NAME=min:opt:max"]),
        ("tests.support.models:tiny --dim Z=1:2:3", ["no input has a dimension 'Z'", "are B, S"]),
        ("tests.support.models:tiny --tolerance 0", ["tolerance is 0.0", "above 0"]),
        ("tests.support.models:tiny --tolerance -0.1", ["tolerance is -0.1", "above 0"]),
        ("tests.support.models:tiny --tolerance nan", ["tolerance is nan", "above 0"]),
        ("SHELF/good.pt --weights SHELF/weights.pt", ["--weights goes with package.module:factory"]),
        ("SHELF/good.pt2 --allow-pickle", ["no upper bound", "input=s", "--dim s"]),
        ("SHELF/good.pt2 --allow-pickle --dim width=1:2:3", ["no input has a dimension 'width'", "input=s"]),
        ("SHELF/good.pt2 --allow-pickle --input input=B,16", ["of the program (input=s", "no upper bound; give one"]),
        ("SHELF/good.pt2 --allow-pickle --dtype float16", ["--dtype cannot change a program"]),
    ],
)
def test_arguments_that_do_not_go_together(arguments: str, words: list[str], shelf: Path) -> None:
    refused(run(*arguments.replace("SHELF", str(shelf)).split(), *QUICK), *words)


# What of a command to replace by what, as its error says.
ADVICE = {
    "tests.support.models:Flat --input x=B,S,16": ("x=B,S,16", "x=B,4,16"),
    "tests.support.models:Halves --input x=B,S,16": ("x=B,S,16", "x=B,6,16"),
    "tests.support.models:Pairs --input x=B,S,8 --dim S=1:4:9": ("S=1:4:9", "S=2:4:9"),
    "tests.support.models:Tagger --input ids=B,S:int64<100 --dim S=1:128:512": ("S=1:128:512", "S=1:16:16"),
    "tests.support.models:Next --input x=B,S,8 --input y=B,T,8 --dim S=4:4:9 --dim T=5:5:12": ("T=5:5:12", "T=5:5:10"),
    "tests.support.models:Add --input x=B,S,8 --input y=B,T,8": ("y=B,T,8", "y=B,S,8"),
    "tests.support.models:tiny --input x=B,S,16:int64": ("S,16:int64", "S,16:float32"),
}


@pytest.mark.parametrize(
    "arguments", [x if at % 2 else pytest.param(x, marks=pytest.mark.thorough) for at, x in enumerate(ADVICE)]
)
def test_advice_that_is_followed_leads_to_a_verified_file(
    arguments: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert run(*arguments.split(), *QUICK).exit_code == 2
    out = tmp_path_factory.mktemp("out")
    result = run(*arguments.replace(*ADVICE[arguments]).split(), "--target", "onnx", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "report.json").read_text())["verdict"] == "passed"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("b"), ""),
        (RuntimeError("the service is closed"), ""),
        (AttributeError("'Model' object has no attribute 'layer'"), ""),
        (NotImplementedError("chunked prefill"), ""),
        (ValueError("no weights for language de"), ""),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x28 and 64x8)"), "a number"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "a number"),
        (ValueError("not enough values to unpack (expected 4, got 3)"), "a number"),
        (RuntimeError("expected m1 and m2 to have the same dtype, but got: long != float"), "the type"),
        (RuntimeError("expected scalar type Float but found Half"), "the type"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_inputs_are_blamed_only_where_shapes_or_types_are_the_trouble(error: Exception, words: str) -> None:
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(ExportError) as refusal:
        capture_module(Fails(), [InputSpec("x", ("B", 4))], {})
    assert str(error) in str(refusal.value)
    assert ("correct the inputs" in str(refusal.value)) == bool(words)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "Missing argument 'MODEL'"),
        ("tests.support.models:tiny more", "unexpected extra argument (more)"),
        ("tests.support.models:tiny --targets onnx", "No such option '--targets'. Did you mean"),
        (
            "tests.support.models:tiny --target tensorflow",
            "'tensorflow' is not one of 'onnx', 'tensorrt-rtx', 'tensorrt'",
        ),
        ("tests.support.models:tiny --opset 17", "17 is not in the range 18<=x<=24"),
        ("tests.support.models:tiny --opset 25", "25 is not in the range 18<=x<=24"),
        ("tests.support.models:tiny --dtype int8", "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        ("tests.support.models:tiny --external-data-threshold -1", "-1 is not in the range x>=0"),
        ("tests.support.models:tiny --compute-capability ,", "write one or more, such as 8.9,12.0"),
        ("tests.support.models:tiny --tolerance little", "'little' is not a valid float"),
        ("tests.support.models:tiny --input B,S,16", "'B,S,16' has no name; write NAME=..."),
        ("tests.support.models:tiny --input =B,S,16", "'=B,S,16' has no name"),
        ("tests.support.models:tiny --input x=B,S,16 --input x=B,S,16", "x is given twice"),
        ("tests.support.models:tiny --dim 1:2:3", "'1:2:3' has no name"),
        ("tests.support.models:tiny --dim S=1:2:3 --dim S=1:2:3", "S is given twice"),
    ],
)
def test_options_that_there_are_not(arguments: str, words: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("adaattn-export: ")
    assert line.endswith("; see --help")
    assert words in line.replace("(Did", "Did")


@pytest.mark.parametrize("name", ["module.pt", "old_module.pt", "plain.pkl"])
def test_a_pickle_with_permission_is_exported(name: str, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("out")
    result = run(shelf / name, *QUICK, "--allow-pickle", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert (out / "model.onnx").exists()


def test_weights_that_are_no_numbers_are_reported(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("out")
    result = run("tests.support.models:Broken", "--input", "x=B,16", "--target", "onnx", "-o", out)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["warnings"] == [
        "weight linear.weight has 1 NaN or Inf of 128 numbers",
        "weight linear.bias has 1 NaN or Inf of 8 numbers",
    ]
    assert all(f"warning: {line}" in result.stdout for line in report["warnings"])
    assert "weight linear.weight has 1 NaN or Inf" in (out / "report.html").read_text()


def test_verbose_adds_the_traceback() -> None:
    result = run("none.pt", "-v")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("adaattn-export: none.pt does not exist")
