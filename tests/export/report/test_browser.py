"""The report in a real browser, where there is one: no complaints on the console, both schemes, desktop and phone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

import adaattn
from adaattn.export import Options, export

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
MARGIN = 8  # CSS pixels at the page's edge that stay empty


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Model(nn.Module):
        """Names long enough to need room."""

        def __init__(self) -> None:
            super().__init__()
            self.the_first_encoder_of_the_model = adaattn.Encoder(32, 4, ("adaptive", "adaptive"))

        def forward(self, x):  # type: ignore[no-untyped-def]
            return {"an_output_with_a_name_that_is_long": self.the_first_encoder_of_the_model(x)}

    folder = tmp_path_factory.mktemp("page") / "out"
    dims = {"S": "1:17:40"}
    return export(Model(), {"x": "B,S,32"}, folder, dims=dims, options=Options(("onnx",))).directory / "report.html"


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(width: int, scheme: str, page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
    done = subprocess.run(
        [
            str(BROWSER), *flags, *quiet, "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
            f"--window-size={width},4000", f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    assert shown.size[0] == width
    background = shown.getpixel((2, 2))
    assert background == ((255, 255, 255) if scheme == "light" else (20, 23, 27))
    # Nothing reaches over the edge: wide tables scroll inside the page.
    assert shown.crop((width - MARGIN, 0, width, shown.size[1])).getcolors() == [(MARGIN * shown.size[1], background)]
    assert len(shown.getcolors(1 << 24)) > 100  # something is drawn
