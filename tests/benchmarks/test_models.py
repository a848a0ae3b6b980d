"""Some of the models of `make models`, a control among them."""

from __future__ import annotations

import pytest

from benchmarks.models import MODELS, measure, page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "sites", "adaptive"),
    [
        ("a hand-written GPT", 2, 2),
        ("Wav2Vec2", 2, 2),
        ("ConvNeXt", 0, 0),
        *(
            pytest.param(*each, marks=pytest.mark.thorough)
            for each in (("CLIP, image", 2, 2), ("VAE", 2, 2), ("gpt-oss", 2, 0), ("DINOv2", 2, 2))
        ),
    ],
)
def test_a_model_that_nobody_here_wrote(name: str, sites: int, adaptive: int) -> None:
    row = measure(name)
    assert (row["verdict"], row["sites"], row["adaptive"]) == ("passed", sites, adaptive), row
    assert bool(row["left"]) == (sites > adaptive)
    assert f"| {name}" in page([row])


def test_there_are_many() -> None:
    assert len(MODELS) >= 25
    assert {entry.package for entry in MODELS.values()} == {"transformers", "diffusers", "torch", ""}
