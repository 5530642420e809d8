"""Of which of timm's families can timm itself load an extracted network, because its arguments can say the sizes?

    python -m benchmarks.hub.run            # about an hour; started again, it goes on where it stopped
    python -m benchmarks.hub.run --quick    # a smoke run of seconds

The smallest model of each of timm's modules is converted, its half-width network is written by `save_pretrained`, and
loaded by `timm.create_model("local-dir:...", pretrained=True)` where there is such a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

import slimmable
from benchmarks.measuring import markdown, origin, read_results, write_result

HERE = Path(__file__).parent
ZOO = HERE.parents[1] / "tests" / "convert" / "zoo.json"
WIDTH = 0.5


def row(module: str, name: str) -> dict[str, Any]:
    """Say how the half-width network of a model can be loaded, and with which arguments timm does."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"module": module, "model": name, "loads": "nothing", "arguments": {}}
    try:
        plain = timm.create_model(name).eval()
        full = {name: parameter.shape for name, parameter in plain.named_parameters()}
        small = slimmable.extract(slimmable.slimify(plain, (1.0, WIDTH), inplace=True), WIDTH).eval()
        if all(parameter.shape == full.get(name) for name, parameter in small.named_parameters()):
            return found | {"loads": "nothing gets narrower"}
        with tempfile.TemporaryDirectory() as folder:
            slimmable.save_pretrained(small, folder)
            if (Path(folder) / "config.json").exists():
                given = json.loads((Path(folder) / "config.json").read_text()).get("model_args", {})
                timm.create_model(f"local-dir:{folder}", pretrained=True)
                told = {
                    key: value for key, value in given.items() if key not in ("in_chans", "num_classes", "img_size")
                }
                return found | {"loads": "timm", "arguments": told}
            slimmable.from_pretrained(folder)
            return found | {"loads": "slimmable"}
    except Exception as error:
        return found | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}


def parameters(name: str) -> int:
    """Return how many parameters a model of timm has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def table(result: dict[str, Any]) -> str:
    """Return the table of the page: the models of each kind, and the names of timm's arguments."""
    rows = result["rows"]
    native = [each for each in rows if each["loads"] == "timm"]
    lines = [
        (f"`{each['model']}`", ", ".join(f"`{name}`" for name in each["arguments"] if name != "global_pool"))
        for each in native
    ]
    heads = {
        "slimmable": "`slimmable.from_pretrained` alone loads",
        "nothing": "An error ended the attempt with",
        "nothing gets narrower": "Nothing gets narrower in",
    }
    text = f"Of {result['modules']} modules of timm, {len(rows)} were tried, those with the smallest models. "
    text += f"timm itself loads {len(native)}:\n\n{markdown(('model', 'arguments that say its sizes'), lines)}"
    for kind, head in heads.items():
        if found := [each["model"] for each in rows if each["loads"] == kind]:
            text += f"\n{head} {len(found)}: {', '.join(found)}.\n"
    return text


def main() -> None:
    """Measure, and write the result and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--most", type=float, default=1.5e7, help="largest number of parameters of a model")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    smallest = json.loads(ZOO.read_text())
    if options.quick:
        smallest = {"vision_transformer": "test_vit", "efficientnet": "test_efficientnet"}
    rows = [each for result in read_results(options.out) for each in result["rows"]]
    sizes = {module: parameters(name) for module, name in smallest.items()}
    for module in sorted(sizes, key=lambda module: sizes[module]):
        if sizes[module] <= options.most and module not in [each["module"] for each in rows]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows.append(row(module, smallest[module]))
            print(rows[-1], flush=True)
            write_result(options.out, "hub", rows, f"width{WIDTH}", modules=len(smallest))
            (result,) = read_results(options.out)
            (options.out / "table.md").write_text(f"{table(result)}\n{origin(result)}\n")


if __name__ == "__main__":
    main()
