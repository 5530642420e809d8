"""The arguments of the command line; nothing heavy is imported here, so `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slimmable.cli.config import (
    DIGITS,
    DISTILLATIONS,
    FOLDER_IMAGE_SIZE,
    GATED_METHODS,
    GLYPHS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    VIEWS,
    PretrainConfig,
)
from slimmable.cli.loggers import LOGGERS

ALL = "all"
_DEFAULT_RUN = "runs/pretrain"
_GATED = f"for {', '.join(GATED_METHODS)}"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the program `slimmable`."""
    parser = argparse.ArgumentParser(
        prog="slimmable", description="Slimmable networks: one set of weights, several widths."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _pretrain(commands.add_parser("pretrain", help="pre-train a slimmable network and evaluate every width"))
    _evaluate(commands.add_parser("evaluate", help="evaluate the network of a run again, as it is now"))
    _compare(commands.add_parser("compare", help="one table and plot of the reports of several runs"))
    _export(
        commands.add_parser("export", aliases=["extract"], help="write widths of a model as files for other programs")
    )
    _profile(commands.add_parser("profile", help="parameters, MACs, activations and latency of a timm model per width"))
    _plan(commands.add_parser("plan", help="what of a timm model would be slimmed, and what stays full and why"))
    return parser


def _pretrain(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS tells an option that was given from one that was not: --resume takes the others from the run, and what
    # is not given depends on the method and the preset.
    default = PretrainConfig()

    def add(group: argparse._ActionsContainer, option: str, kind: type, text: str, **more: Any) -> None:
        value = getattr(default, option[2:].replace("-", "_"))
        shown = f"{text} (default: {value})"
        group.add_argument(option, type=kind, default=argparse.SUPPRESS, help=shown, **more)

    main = parser.add_argument_group("what", "defaults are those of mocov2 on the embedded digits")
    add(main, "--method", str, "how to train", choices=METHODS)
    main.add_argument("--preset", metavar="NAME", help="published settings by name, such as slimclr-mocov2-imagenet")
    add(main, "--model", str, "a timm model, or small-resnet: timm's ResNet-10 with few channels for small images")
    add(
        main,
        "--data",
        str,
        f"{DIGITS}: embedded cluttered digits; {GLYPHS}: drawn characters; or a folder of images per class, whose "
        "names serve the evaluation only, but for --method supervised",
    )
    add(main, "--images", int, "number of embedded images to train on; a quarter as many are held out")
    add(main, "--image-size", int, f"height and width in pixels; of a folder {FOLDER_IMAGE_SIZE}")
    _add_widths(main, argparse.SUPPRESS)
    main.add_argument(
        "--universal",
        action="store_true",
        default=argparse.SUPPRESS,
        help="any width from the narrowest on, trained by the sandwich rule",
    )
    text = f"train one width dense and gated, the gated pass for this share of its multiply-adds; {_GATED}"
    add(main, "--gate-budget", float, text, metavar="SHARE")

    how = parser.add_argument_group("how")
    add(how, "--epochs", int, "passes over the training images")
    add(how, "--batch-size", int, "images per step, of all processes together")
    add(how, "--optimizer", str, "norms and biases do not decay", choices=OPTIMIZERS)
    add(how, "--learning-rate", float, "peak, for this batch size")
    add(how, "--joined-learning-rate", float, "peak after the slow start, if another")
    add(how, "--warm-up", float, "epochs over which the learning rate rises, else a twentieth; then a cosine")
    add(how, "--weight-decay", float, "of weights")
    add(how, "--embedding", int, "size of an embedding")
    add(how, "--hidden", int, "units between the layers of the head; 0: as many as features")
    add(how, "--temperature", float, "of a contrastive loss")
    add(how, "--momentum", float, "of a momentum encoder; mocov3 and byol let it rise to 1")
    add(how, "--queue-size", int, "keys that mocov2 keeps, at most a quarter of the images")
    add(how, "--key-parts", int, "parts of the batch that mocov2 makes keys of one by one")
    add(how, "--distill", str, "how the full width teaches; own: what suits the method", choices=DISTILLATIONS)
    add(how, "--weights", str, "of the widths' losses, as in slimmable.losses.width_weights")
    add(how, "--slow-start", float, "share of the training before narrower widths join")
    add(how, "--gate-weight", float, "of the loss on what the gated network costs")
    add(how, "--gate-speed", float, "learning rate of the gates over that of the rest")
    add(how, "--views", str, "whose augmentations", choices=VIEWS)
    add(how, "--smallest-crop", float, "least share of an image's area in a view")
    add(how, "--precision", str, "bfloat16: mixed precision", choices=PRECISIONS)
    add(how, "--seed", int, "of weights, order and views")

    where = parser.add_argument_group("where")
    where.add_argument(
        "--output", default=_DEFAULT_RUN, metavar="RUN", help="run folder to make (default: %(default)s)"
    )
    where.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    where.add_argument("--log", nargs="+", choices=LOGGERS, default=(), help="besides losses.csv in the run folder")
    where.add_argument(
        "--log-every",
        type=int,
        default=10,
        metavar="STEPS",
        help="steps from one logged to the next (default: %(default)s)",
    )
    where.add_argument(
        "--knn-every",
        type=int,
        metavar="EPOCHS",
        help="epochs from one kNN accuracy on held-out images to the next; 0: none "
        "(default: a tenth of all with --gate-budget, else 0)",
    )
    where.add_argument(
        "--diagnostics", action="store_true", help="sample the widths' gradients: imbalance and divergence"
    )
    _add_workers(where)
    _add_device(where)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a pre-training run")
    parser.add_argument(
        "--probes",
        nargs="+",
        choices=("knn", "linear", "slimmable", "ridge"),
        default=("knn", "linear"),
        help="linear: one classifier per width; slimmable: one for all; ridge: closed form (default: knn linear)",
    )
    parser.add_argument(
        "--finetune", type=int, default=0, metavar="EPOCHS", help="also fine-tune each extracted width with the labels"
    )
    _add_workers(parser)
    _add_device(parser)


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a pre-training run")
    parser.add_argument(
        "--output", default="runs/compare", metavar="FOLDER", help="where to write (default: %(default)s)"
    )


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


def _add_workers(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read and augment images (default: by the processors)"
    )


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default=None, help="such as cpu or cuda (default: cuda where there is one)")
