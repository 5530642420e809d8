"""Networks on the Hugging Face Hub, or in a folder like those there: the file of `save`, and a model card."""

import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slimmable._atomic import filled_aside
from slimmable._checks import check_fraction, check_whole, checked
from slimmable._convert import extract
from slimmable._inputs import Arguments, example_of, output_tensors
from slimmable._modules import in_eval_mode
from slimmable._profile import Profile, profile
from slimmable._width import widths_of
from slimmable._widths import width_index
from slimmable.analysis.plan import Setting
from slimmable.errors import CheckpointError, explained
from slimmable.files.model import load, narrow_arguments, read, save, versions
from slimmable.view.state import is_slim

FILE = "slimmable.safetensors"


def model_card(costs: Profile, **about: Any) -> str:
    """Return the model card as Markdown: `card.md.jinja`, filled with these values; what it does not get, it omits."""
    text = Path(__file__).with_name("card.md.jinja").read_text()
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return str(template.render(versions(), python=platform.python_version(), costs=costs.rows, **about))


@checked
def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    example_inputs: Any = None,
    arguments: Mapping[str, Any] | None = None,
    accuracy: Mapping[float, Mapping[str, float]] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> None:
    """Write `model` into a folder that `from_pretrained` reads, as it reads a repository of the Hugging Face Hub.

    The folder gets `slimmable.safetensors`, the file of `slimmable.save`, and a model card, `README.md`, with what each
    width costs and the lines that load it. A plain network, such as one from `extract`, is written as timm or
    transformers would write it, too, if that makes the same network again, which is tried.

    Args:
        model: a converted or gated model, or a plain network.
        folder: files of these names in it are replaced.
        example_inputs: as for `slimify`; timm models need none. The costs in the card are those of a forward on it.
        arguments: as for `save`.
        accuracy, license: for the card: by width (1.0 for a plain network) and name, a number in [0, 1], such as
            `evaluate_widths` returns; and an identifier such as "apache-2.0".
        repo_id: the repository that the lines in the card load; by default they load the folder.

    Raises: CheckpointError: as for `save`, and if the folder has the `config.json` of another network.
        WidthError: if there is an accuracy of an unknown width.

    >>> import tempfile, timm
    >>> model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.5))
    >>> folder = Path(tempfile.mkdtemp(), "resnet")
    >>> slimmable.save_pretrained(model, folder, accuracy={1.0: {"top-1": 0.8}, 0.5: {"top-1": 0.7}})
    >>> slimmable.from_pretrained(folder, width=0.5).fc
    Linear(in_features=48, out_features=3, bias=True)
    """
    check_whole("save_pretrained", model)
    widths = widths_of(model) if is_slim(model) else ()
    accuracy = {} if accuracy is None else accuracy
    for width, shares in accuracy.items():
        width_index(width, widths or (1.0,))
        check_fraction("save_pretrained", **{f"accuracy of {name}": share for name, share in shares.items()})
    args, _ = example = example_of(model, example_inputs)
    with filled_aside(Path(folder)) as aside:
        save(model, aside / FILE, arguments=arguments)
        recipe = read(aside / FILE)[0]["recipe"] or {}
        native = "" if widths else _write_native(model, aside, recipe, example)
        config: Any = getattr(model, "config", None)
        if not recipe and not native and hasattr(config, "save_pretrained"):
            config.save_pretrained(str(aside))
        has_config = (aside / "config.json").exists()
        if not has_config and os.path.exists(Path(folder, "config.json")):
            raise CheckpointError(f"{folder} has the config.json of another network; choose another folder")
        image = tuple(args[0].shape[1:]) if recipe and args and isinstance(args[0], Tensor) else ()
        costs = profile(model, image or None, example_inputs=None if image else example_inputs, repeats=0)
        about = {"name": recipe.get("timm", type(model).__name__), "arguments": recipe.get("arguments"), "image": image}
        about |= {"native": native, "config": has_config, "repo_id": repo_id, "folder": Path(folder).resolve().name}
        card = model_card(costs, model=model, widths=widths, accuracy=accuracy, license=license, **about)
        (aside / "README.md").write_text(card, encoding="utf-8")


def _write_native(model: Any, folder: Path, recipe: Mapping[str, Any], example: Arguments) -> str:
    """Let timm, or its own class, write a plain network; return the library if it makes the same of them, or ""."""
    import timm

    with tempfile.TemporaryDirectory() as aside, warnings.catch_warnings(), suppress(Exception):  # errors of all kinds
        warnings.simplefilter("ignore")
        if recipe:
            timm.models.save_for_hf(model, aside, model_args=narrow_arguments(model, recipe), safe_serialization=True)
            again = timm.create_model(f"local-dir:{aside}", pretrained=True)
        else:
            model.save_pretrained(aside)
            again = type(model).from_pretrained(aside)
        again.to(next(model.parameters()))  # to its device and type
        with torch.no_grad(), torch.random.fork_rng(devices=()), in_eval_mode(model), in_eval_mode(again):
            noise = tree_map_only(Tensor, lambda x: torch.rand_like(x) if x.is_floating_point() else x, example)
            ours, theirs = (output_tensors(network(*noise[0], **noise[1])) for network in (model, again))
        if len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)):
            shutil.copytree(aside, folder, dirs_exist_ok=True)
            return type(model).__module__.partition(".")[0]
    return ""


@checked
def push_to_hub(
    model: nn.Module, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
) -> str:
    """Upload what `save_pretrained` writes to a repository of the Hugging Face Hub, and return the commit's address.

    Args:
        model, options: as for `save_pretrained`.
        repo_id: the repository, as in "user/resnet50-slim". The files and the card of a network in it are replaced.
        private: whether a new repository is private; by default, as the account says.
        token: of the account; by default, the one that `hf auth login` stored.

    Raises: CheckpointError: if the Hub cannot be reached or refuses; and as for `save_pretrained`.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name:
        save_pretrained(model, name, repo_id=repo_id, **options)
        with explained(f"push_to_hub: {repo_id!r} cannot be pushed", kind=CheckpointError):
            api = HfApi(token=token)
            place = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            stale = ["config.json", "*model*.safetensors*"]  # of another network, for timm and transformers
            return str(api.upload_folder(repo_id=place, folder_path=name, delete_patterns=stale).commit_url)


@checked
def from_pretrained(
    repo_or_folder: str | Path,
    width: "Setting | None" = None,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Return the model that `push_to_hub` or `save_pretrained` wrote, on the CPU and in evaluation mode; see `load`.

    Args:
        repo_or_folder: a folder if there is one of this name, otherwise a repository of the Hugging Face Hub.
        width: None for the model as it was saved; otherwise the plain network of this width, as from `extract`.
        model: the plain full-width network, with any weights, if it is not timm's; as for `load`.
        revision, token: a branch, tag or commit, and the token of an account; as for `huggingface_hub.hf_hub_download`.

    Raises: CheckpointError: if there is no such file, or it is damaged or of another network. ConversionError: if a
        width is asked of a network that was saved as a plain one.
    """
    path = Path(repo_or_folder, FILE)
    if not os.path.isdir(repo_or_folder):
        from huggingface_hub import hf_hub_download

        what = f"from_pretrained: {str(repo_or_folder)!r} is no folder, and cannot be read from the Hub"
        with explained(what, kind=CheckpointError):
            path = Path(hf_hub_download(str(repo_or_folder), FILE, revision=revision, token=token))
    found = load(path, model)
    return found if width is None else extract(found, width).eval()
