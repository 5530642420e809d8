"""The arguments of the command line; nothing heavy is imported here, so `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from slimmable.cli.config import FOLDER_IMAGE_SIZE, PretrainConfig

ALL = "all"
_DEFAULT_RUN = "runs/pretrain"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the program `slimmable`."""
    parser = argparse.ArgumentParser(
        prog="slimmable", description="Slimmable networks: one set of weights, several widths."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _pretrain(commands.add_parser("pretrain", help="pre-train a slimmable network by SlimCLR and evaluate every width"))
    _evaluate(commands.add_parser("evaluate", help="evaluate the network of a run again, as it is now"))
    _export(
        commands.add_parser("export", aliases=["extract"], help="write widths of a model as files for other programs")
    )
    _profile(commands.add_parser("profile", help="parameters, MACs, activations and latency of a timm model per width"))
    _plan(commands.add_parser("plan", help="what of a timm model would be slimmed, and what stays full and why"))
    return parser


def _pretrain(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS tells an option that was given from one that was not: --resume takes the others from the run.
    default = PretrainConfig()

    def add(option: str, kind: type, text: str) -> None:
        value = getattr(default, option[2:].replace("-", "_"))
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {value})")

    add("--model", str, "a timm model, or small-resnet: timm's ResNet-10 with few channels and a stem for small images")
    parser.add_argument(
        "--data",
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="a folder of images per class, whose names serve the evaluation only (default: embedded cluttered digits)",
    )
    _add_widths(parser, argparse.SUPPRESS)
    add("--epochs", int, "passes over the training images")
    add("--batch-size", int, "images per step")
    add("--image-size", int, f"height and width in pixels; with --data {FOLDER_IMAGE_SIZE}")
    add("--learning-rate", float, "peak learning rate of AdamW")
    add("--images", int, "number of embedded digits to train on; a quarter as many are held out")
    add("--seed", int, "of weights, order and views")
    parser.add_argument(
        "--output", default=_DEFAULT_RUN, metavar="RUN", help="run folder to make (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    _add_device(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a pre-training run")
    _add_device(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="a timm model, a file of slimmable.save, or the folder of a pre-training run",
    )
    parser.add_argument(
        "--width", type=_width, action="append", required=True, help="width to write, or all; may be given again"
    )
    parser.add_argument(
        "--format",
        choices=("pt2", "onnx", "safetensors"),
        action="append",
        help="pt2: torch.export, runs with torch alone; onnx: for any ONNX runtime; safetensors: the weights; "
        "may be given again (default: pt2, and onnx where it is installed)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="where to write (default: the run folder, or runs/export/MODEL)"
    )
    model = parser.add_argument_group("of a timm model; a file and a run have their own")
    _add_widths(model, None)
    weights = model.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights, plain or of the converted model")
    weights.add_argument("--pretrained", action="store_true", help="timm's weights (default: random ones)")
    model.add_argument("--num-classes", type=int, metavar="N", help="of the classifier; 0: features")
    model.add_argument("--image-size", type=int, help="height and width in pixels (default: the model's own)")


def _width(text: str) -> float | str:
    if text == ALL:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {ALL}") from None


def _profile(parser: argparse.ArgumentParser) -> None:
    _add_timm(parser)
    parser.add_argument("--csv", metavar="FILE", help="also write the table as CSV")


def _plan(parser: argparse.ArgumentParser) -> None:
    _add_timm(parser)


def _add_timm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a timm model")
    parser.add_argument("--image-size", type=int, help="height and width in pixels (default: the model's own)")
    _add_widths(parser, None)


def _add_widths(parser: argparse._ActionsContainer, default: str | None) -> None:
    shown = " ".join(str(width) for width in PretrainConfig.widths)
    parser.add_argument(
        "--widths",
        nargs="+",
        type=float,
        default=default,
        metavar="W",
        help=f"shares of the channels, in (0, 1], with 1 among them (default: {shown})",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="such as cpu or cuda (default: cuda where there is one)")
