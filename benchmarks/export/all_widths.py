"""Is one ONNX file with all widths as small, exact and fast as files of single widths, for every family?

    python -m benchmarks.export.all_widths                   # the smallest model of each of timm's modules, for hours
    python -m benchmarks.export.all_widths --models resnet vision_transformer
    python -m benchmarks.export.all_widths --no-times        # half as long, without the columns of time and memory

Each model of `tests/convert/zoo.json` is written by `slimmable.export` with all widths, and each width alone, with
random weights; what is in `results/all-widths.csv` already is not done again. Times are processor times of one thread,
of calls of both files in turn, of one image. Memory is what a process gains by loading the sessions, in a process of
its own. The last step writes `results/all-widths.md`.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch

import slimmable
from benchmarks.export.run import HERE, ROOT, WIDTHS, shaken
from benchmarks.measuring import append_rows, compare, interleaved, markdown, median_cpu_ms, origin, read_rows

FIELDS = (
    *("module", "model", "full_bytes", "norm_bytes", "all_bytes", "off", "openvino_off"),
    *(f"ratio_{width}" for width in WIDTHS),
    *(f"ms_{width}" for width in WIDTHS),
    *("memory_all", "memory_single", "seconds", "error"),
)
Row = dict[str, str]


def session_of(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _resident() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _gained(paths: list[Path], queue: Any) -> None:
    before = _resident()
    sessions = [session_of(path) for path in paths]
    queue.put(_resident() - before)
    del sessions


def memory_of(paths: list[Path]) -> int:
    """Return the bytes that a process gains by loading these files."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=_gained, args=(paths, queue))
    process.start()
    gained: int = queue.get(timeout=300)
    process.join()
    return gained


def examine(name: str, folder: Path, with_times: bool) -> Row:
    torch.manual_seed(0)
    slim = slimmable.slimify(shaken(timm.create_model(name).eval()), WIDTHS)
    images = torch.rand(1, *slim.pretrained_cfg["input_size"])
    path, singles = folder / "all.onnx", [folder / f"{width}.onnx" for width in WIDTHS]
    written = slimmable.export(slim, path)
    plain = slimmable.export(slim, singles[0], width=1.0)
    if with_times:
        for width, single in zip(WIDTHS[1:], singles[1:], strict=True):
            slimmable.export(slim, single, width=width)
    norms = sum(tensor.nbytes for key, tensor in slim.state_dict().items() if ".narrow." in key)
    row = {
        "full_bytes": str(plain.size),  # with weights beside the file
        "norm_bytes": str(norms),
        "all_bytes": str(written.size),
    }
    if with_times:
        row |= {"memory_all": str(memory_of([path])), "memory_single": str(memory_of(singles))}
    session, off, away = session_of(path), 0.0, 0.0
    try:
        import openvino

        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except Exception as error:
        compiled, row["openvino_off"] = None, str(error).strip().splitlines()[-1][:100]
    for at, width in enumerate(WIDTHS):
        with torch.no_grad():
            right = slimmable.extract(slim, width).eval()(images).numpy()
        feed = {"images": images.numpy(), "width": np.array(at)}
        found = session.run(None, feed)[0]
        off = max(off, float(abs(found - right).max() / abs(right).max()))
        if compiled is not None:
            away = max(away, float(abs(compiled(feed)[0] - right).max() / abs(right).max()))
        if not with_times:
            continue
        single, own = session_of(singles[at]), {"images": feed["images"]}
        calls = {"joined": partial(session.run, None, feed), "single": partial(single.run, None, own)}
        times = interleaved(calls, seconds=1, least=12)
        ratio, ms = compare(times["joined"], times["single"])["ratio"], median_cpu_ms(times["joined"])
        row |= {f"ratio_{width}": f"{ratio:.3f}", f"ms_{width}": f"{ms:.2f}"}
    if compiled is not None:
        row["openvino_off"] = f"{away:.1e}"
    return row | {"off": f"{off:.1e}"}


def goals_of(row: Row) -> dict[str, bool]:
    """Return which of the goals a family meets."""
    if row["error"]:
        return {}
    goals = {
        "at most 1.05 x the full file and the narrow norms": int(row["all_bytes"])
        <= 1.05 * int(row["full_bytes"]) + int(row["norm_bytes"]),
        "within 1e-5 of `extract`": float(row["off"]) <= 1e-5,
        "OpenVINO within 1e-4": row["openvino_off"][:1].isdigit() and float(row["openvino_off"]) <= 1e-4,
    }
    if row["memory_all"]:
        ratios = [float(row[f"ratio_{width}"]) for width in WIDTHS]
        goals["at most 1.10 x the time of its own file, at every width"] = max(ratios) <= 1.10
        goals["at most the memory of the single sessions"] = int(row["memory_all"]) <= int(row["memory_single"])
    return goals


def table(rows: list[Row]) -> str:
    """Return one line per model, and how many meet each goal, as Markdown."""
    header = ("module", "model", "file / full file", "off by", "time / own file, by width", "memory / singles", "fails")
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["module"], row["model"], "", "", "", "", row["error"]))
            continue
        timed = row["memory_all"] != ""
        ratios = " ".join(f"{float(row[f'ratio_{width}']):.2f}" for width in WIDTHS if timed)
        memory = f"{int(row['memory_all']) / int(row['memory_single']):.2f}" if timed else ""
        missed = "; ".join(goal for goal, met in goals_of(row).items() if not met)
        size = f"{int(row['all_bytes']) / int(row['full_bytes']):.2f}"
        lines.append((row["module"], row["model"], size, row["off"], ratios, memory, missed))
    met: dict[str, list[bool]] = {}
    for row in rows:
        for goal, is_met in goals_of(row).items():
            met.setdefault(goal, []).append(is_met)
    count = sum(not row["error"] for row in rows)
    counts = "".join(f"- {goal}: {sum(found)} of {len(found)}\n" for goal, found in met.items())
    return f"{markdown(header, lines)}\n{len(rows)} families tried, {count} exported; of these\n\n{counts}"


def main() -> None:
    """Do what is not done, family by family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="MODULE", help="modules of timm (default: all)")
    parser.add_argument("--no-times", dest="times", action="store_false", help="whether it is small and right alone")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    zoo: dict[str, str] = json.loads((ROOT / "tests" / "convert" / "zoo.json").read_text())
    path = given.out / "all-widths.csv"
    for module in given.models or zoo:
        if module not in {row["module"] for row in read_rows(path)}:
            start, row = time.perf_counter(), dict.fromkeys(FIELDS, "") | {"module": module, "model": zoo[module]}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    row |= examine(zoo[module], Path(folder), given.times)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            row["seconds"] = f"{time.perf_counter() - start:.0f}"
            print(" ".join(f"{key}={value}" for key, value in row.items() if value), flush=True)
            append_rows(path, FIELDS, [row])
        made = json.loads(path.with_suffix(".json").read_text())
        (given.out / "all-widths.md").write_text(f"{table(read_rows(path))}\n{origin(made)}\n")


if __name__ == "__main__":
    main()
