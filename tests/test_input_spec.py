"""What users write for inputs and dimensions: it is read as meant, or refused with the text, the reason, a remedy."""

from __future__ import annotations

import pytest

from adaattn.errors import ConfigError
from adaattn.input_spec import INT_MAX, Dimension, InputSpec, default_dimension

WRITE_INPUT, WRITE_DIM = "write NAME=SHAPE[:TYPE[:MEANING]], such as", "write NAME=min:opt:max, such as S=1:128:4096"


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("B,S,512:float32", InputSpec("x", ("B", "S", 512), "float32")),
        ("B,S,512", InputSpec("x", ("B", "S", 512))),
        (" B, S , 512 : float16 ", InputSpec("x", ("B", "S", 512), "float16")),
        ("batch_1,seq", InputSpec("x", ("batch_1", "seq"))),
        ("B,S:int64<30522", InputSpec("x", ("B", "S"), "int64", 30522)),
        ("B : int32 < 7", InputSpec("x", ("B",), "int32", 7)),
        ("B,S:bool", InputSpec("x", ("B", "S"), "bool")),
        ("B,S:bool:masked", InputSpec("x", ("B", "S"), "bool", None, "masked")),
        ("B,S : float16 : bias ", InputSpec("x", ("B", "S"), "float16", None, "bias")),
        ("B,S::bias", InputSpec("x", ("B", "S"), None, None, "bias")),
        ("B,S:int64<2:attend", InputSpec("x", ("B", "S"), "int64", 2, "attend")),
        ("B,S:int64<9:values", InputSpec("x", ("B", "S"), "int64", 9, "values")),
        ("::values", InputSpec("x", (), None, None, "values")),
        ("", InputSpec("x", ())),
        (":float64", InputSpec("x", (), "float64")),
        (f"1,{INT_MAX}", InputSpec("x", (1, INT_MAX))),
    ],
)
def test_an_input_is_read_and_written_alike(text: str, spec: InputSpec) -> None:
    assert InputSpec.parse("x", text) == spec
    assert InputSpec.parse("x", str(spec)) == spec


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x", "B,S-1,8", "input x=B,S-1,8: 'S-1' is neither a size nor a name such as S"),
        ("x", "B,,8", "'' is neither a size nor a name"),
        ("x", "B,S,", "'' is neither a size nor a name"),
        ("x", "b s 8", "'b s 8' is neither a size nor a name"),
        ("x", "B,*", "'*' is neither"),
        ("x", "-1,8", "'-1' is neither"),
        ("x", "B,2S", "'2S' is neither"),
        ("x", "B,1.5", "'1.5' is neither"),
        ("x", "B,²", "'²' is neither"),
        ("x", "(B,S)", "'(B' is neither"),
        ("x", "B,0", "a size is 0; sizes are 1 to 2147483647"),
        ("x", f"B,{2**64}", f"a size is {2**64}; sizes are 1 to"),
        ("x", "B,S:float99", "type 'float99' is unknown; choose one of float32, float16, bfloat16"),
        ("x", "B,S:torch", "type 'torch' is unknown"),
        ("x", "B,S:", WRITE_INPUT),
        ("x", "B,S:float32:int64", "meaning 'int64' is unknown; choose one of attend, masked, bias, values"),
        ("x", "B,S:bool:Masked", "meaning 'Masked' is unknown"),
        ("x", "B,S:bool:", WRITE_INPUT),
        ("x", "B,S::", WRITE_INPUT),
        ("x", "B,S:bool:masked:attend", WRITE_INPUT),
        ("x", "B,S:masked", "type 'masked' is unknown"),
        ("x", "B,S:bool:bias", "a bias is added to scores; it needs a floating-point type"),
        ("x", "B,S:int64:bias", "it needs a floating-point type"),
        ("x", "B,S:int64<3:attend", "a mask of integers has 0 and 1; leave out '<3'"),
        ("x", "B,S:int64<", WRITE_INPUT),
        ("x", "B,S:int64<-5", WRITE_INPUT),
        ("x", "B,S:int64<0", "'<0' needs an integer type and at least 1"),
        ("x", "B,S:float32<5", "'<5' needs an integer type"),
        ("x", "B,S<5", "'<5' needs an integer type"),
        ("x y", "B,S", WRITE_INPUT),
        ("1x", "B,S", WRITE_INPUT),
        ("", "B,S", WRITE_INPUT),
    ],
)
def test_what_is_no_input_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InputSpec.parse(name, text)
    assert message in str(caught.value)
    assert f"input {name}={text}" in str(caught.value)


@pytest.mark.parametrize("sizes", ["1:128:4096", "1:1:1", f"{INT_MAX}:{INT_MAX}:{INT_MAX}", "7:7:9"])
def test_a_dimension_is_read_and_written_alike(sizes: str) -> None:
    dimension = Dimension.parse("S", sizes)
    assert [dimension.min, dimension.opt, dimension.max] == [int(size) for size in sizes.split(":")]
    assert str(dimension) == sizes


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("S", "5:3:9", "sizes must be in order, 0 ≤ min ≤ opt ≤ max"),
        ("S", "9:9:5", "sizes must be in order"),
        ("S", "0:0:0", "0 ≤ min"),
        ("S", f"1:2:{INT_MAX + 1}", f"max ≤ {INT_MAX}"),
        ("S", "-1:2:3", WRITE_DIM),
        ("S", "1:2", WRITE_DIM),
        ("S", "1:2:3:4", WRITE_DIM),
        ("S", "1:2:", WRITE_DIM),
        ("S", "a:b:c", WRITE_DIM),
        ("S", "1.5:2:3", WRITE_DIM),
        ("S", "", WRITE_DIM),
        ("2S", "1:2:3", WRITE_DIM),
        ("", "1:2:3", WRITE_DIM),
    ],
)
def test_what_is_no_dimension_is_refused(name: str, sizes: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Dimension.parse(name, sizes)
    assert message in str(caught.value)
    assert f"dimension {name}={sizes}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("B", "1:1:8"), ("batch", "1:1:8"), ("N", "1:1:8"), ("S", "1:128:512"), ("T", "1:128:512"), ("_b", "1:128:512")],
)
def test_a_dimension_that_nobody_described(name: str, sizes: str) -> None:
    assert str(default_dimension(name)) == sizes
