"""Networks on the Hugging Face Hub, or in a folder like those there: the file of `save`, and a model card.

The network of a single width is written in the format of timm or transformers too, if that can say its sizes.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimmable._atomic import fill_aside
from slimmable._checks import check_flags, check_fraction, check_path, check_whole, checked
from slimmable._convert import extract
from slimmable._inputs import Arguments, example_of
from slimmable._modules import in_eval_mode
from slimmable._nested import output_tensors
from slimmable._profile import profile
from slimmable._width import widths_of
from slimmable._widths import width_index
from slimmable.analysis.plan import Setting
from slimmable.errors import CheckpointError
from slimmable.files.card import Source, model_card
from slimmable.files.construction import full_network, narrow_arguments
from slimmable.files.model import load, read, save
from slimmable.view.state import is_slim

FILE = "slimmable.safetensors"
_NATIVE = ("config.json", "generation_config.json", "*model*.safetensors", "*.index.json")  # of timm, of transformers


@checked
def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    example_inputs: Any = None,
    arguments: Mapping[str, Any] | None = None,
    accuracy: Mapping[float, Mapping[str, float]] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
) -> None:
    """Write `model` into a folder that `from_pretrained` reads, as it reads a repository of the Hugging Face Hub.

    The folder gets `slimmable.safetensors`, the file of `slimmable.save`, and a model card, `README.md`, with what each
    width costs. A plain network, such as one from `extract`, is written as timm or transformers would write it, too
    (`config.json` and `model.safetensors`), if that makes the same network again, which is tried; then their own
    `from_pretrained` loads it. The card has the lines that load what is there.

    Args:
        model: a converted or gated model, or a plain network.
        folder: files of these names in it are replaced.
        example_inputs: as for `slimify`; the costs in the card are those of a forward on it. timm models need none.
        arguments: as for `save`.
        accuracy: width -> name -> accuracy in [0, 1], for the card, such as `evaluate_widths` returns. A plain network
            has the width 1.0.
        license, base_model: for the card: an identifier such as "apache-2.0", and a model on the Hub.
        repo_id: the repository that the lines in the card load; by default they load the folder.

    Raises: CheckpointError: as for `save`, and if the folder has the `config.json` of another network. WidthError: if
        there is an accuracy of an unknown width.

    >>> import slimmable, tempfile, timm
    >>> model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.5))
    >>> folder = Path(tempfile.mkdtemp(), "resnet")
    >>> slimmable.save_pretrained(model, folder, accuracy={1.0: {"top-1": 0.8}, 0.5: {"top-1": 0.7}})
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'slimmable.safetensors']
    >>> slimmable.from_pretrained(folder, width=0.5).fc
    Linear(in_features=48, out_features=3, bias=True)
    """
    check_whole("save_pretrained", model)
    widths = widths_of(model) if is_slim(model) else ()
    accuracy = {} if accuracy is None else accuracy
    for width, shares in accuracy.items():
        width_index(width, widths or (1.0,))
        for name, share in shares.items():
            check_fraction("save_pretrained", **{f"accuracy of {name}": share})
    args, kwargs = example_of(model, example_inputs)
    config: Any = getattr(model, "pretrained_cfg", None)
    image = isinstance(config, Mapping) and not kwargs and isinstance(args[0], Tensor) and args[0].ndim == 4
    costs = profile(model, example_inputs=args[0][:1] if image else example_inputs, repeats=0)

    def write(aside: Path) -> None:
        save(model, aside / FILE, arguments=arguments)
        recipe = read(aside / FILE)[0]["recipe"]
        native = not widths and _write_native(model, aside, recipe, (args, kwargs))
        usage = {
            "place": Path(folder).resolve().name if repo_id is None else repo_id,
            "scheme": "local-dir" if repo_id is None else "hf-hub",
            "kind": type(model),
            "config": type(cast(Any, model).config)
            if recipe is None and not native and _write_config(model, aside)
            else None,
            "recipe": recipe,
            "native": native,
        }
        if os.path.exists(Path(folder, "config.json")) and not (aside / "config.json").exists():
            raise CheckpointError(f"{folder} has the config.json of another network; choose another folder")
        about: dict[str, Any] = {"base": base_model, "accuracy": accuracy, "license": license, "weights": ""}
        about["image"] = tuple(args[0].shape[1:]) if image else ()
        about |= {name: tuple(config[name]) if image else () for name in ("mean", "std")}
        name = type(model).__name__ if recipe is None else recipe["timm"]
        made = recipe["arguments"] if widths and recipe else None  # those of a narrow network are not known exactly
        library = "slimmable" if not native else type(model).__module__.partition(".")[0]
        card = model_card(Source(name, model, widths, arguments=made, **about), costs, library, usage=usage)
        (aside / "README.md").write_text(card, encoding="utf-8")

    fill_aside(Path(folder), write)


def _write_native(model: Any, folder: Path, recipe: Mapping[str, Any] | None, example: Arguments) -> bool:
    """Let timm, or its class, write a plain network; keep their files if they make the same network again."""
    import timm

    with tempfile.TemporaryDirectory() as aside, warnings.catch_warnings(), suppress(Exception):  # errors of all kinds
        warnings.simplefilter("ignore")
        if recipe is None:
            model.save_pretrained(aside)
            again = type(model).from_pretrained(aside)
        else:
            given = narrow_arguments(model, recipe)
            timm.models.save_for_hf(model, aside, model_args=given, safe_serialization=True)
            again = timm.create_model(f"local-dir:{aside}", pretrained=True)
        if _are_same(model, again, example):
            shutil.copytree(aside, folder, dirs_exist_ok=True)
            return True
    return False


def _write_config(model: Any, folder: Path) -> bool:
    """Write the configuration of a model of transformers if it makes the full network, and return whether it does."""
    full = full_network(model)
    with suppress(Exception), torch.device("meta"):  # it has none, or a constructor fails
        if type(full)(model.config).state_dict().keys() == full.state_dict().keys():
            model.config.save_pretrained(str(folder))
            return True
    return False


def _are_same(model: nn.Module, other: nn.Module, example: Arguments) -> bool:
    """Tell whether two networks have the same tensors, and the same outputs for random inputs like the example."""
    ours = model.state_dict()
    theirs = other.to(next(iter(ours.values())).device).state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        return False

    def noise(leaf: Any) -> Any:
        return torch.rand_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    with torch.no_grad(), torch.random.fork_rng(devices=()), in_eval_mode(model), in_eval_mode(other):
        args, kwargs = tree_map(noise, example)
        found = [output_tensors(network(*args, **kwargs)) for network in (model, other)]
    return all(map(torch.equal, *found))


@checked
def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> str:
    """Upload what `save_pretrained` writes to a repository of the Hugging Face Hub, and return the commit's address.

    Args:
        model: as for `save_pretrained`.
        repo_id: name of the repository, as in "user/resnet50-slim", which is made if it does not exist. Files of an
            earlier network in it are replaced, and the model card too.
        private: whether a new repository is private; by default, as the account says.
        revision: a branch, which is made if it does not exist.
        token: of the account; by default, the one that `hf auth login` stored.
        options: the keyword arguments of `save_pretrained`.

    Raises: CheckpointError: if the Hub cannot be reached or refuses. The others are as for `save_pretrained`.
    """
    from huggingface_hub import HfApi

    if private is not None:
        check_flags("push_to_hub", private=private)
    with tempfile.TemporaryDirectory() as name:
        save_pretrained(model, name, repo_id=repo_id, **options)
        with _explained(f"push_to_hub: {repo_id!r} cannot be pushed"):
            api = HfApi(token=token)
            place = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(place, branch=revision, exist_ok=True)
            what: Any = {"commit_message": "Upload with slimmable", "delete_patterns": list(_NATIVE)}
            return str(api.upload_folder(repo_id=place, folder_path=name, revision=revision, **what).commit_url)


@checked
def from_pretrained(
    repo_or_folder: str | Path,
    width: "Setting | None" = None,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """Return the model that `push_to_hub` or `save_pretrained` wrote, on the CPU and in evaluation mode; see `load`.

    Nothing in a repository is executed; its file of tensors is all that is read.

    Args:
        repo_or_folder: a folder if there is one of this name, otherwise a repository of the Hugging Face Hub.
        width: None for the model as it was saved; otherwise the plain network of this width, as from `extract`.
        model: the plain full-width network, with any weights, if it is not timm's; as for `load`.
        revision, token, cache_dir: as for `huggingface_hub.hf_hub_download`.

    Raises: CheckpointError: if there is no such file, or it is damaged or of another network. ConversionError: if a
        width is asked of a network that was saved as a plain one.
    """
    check_path("from_pretrained", repo_or_folder=repo_or_folder)
    path = Path(repo_or_folder, FILE)
    if not os.path.isdir(repo_or_folder):
        from huggingface_hub import hf_hub_download

        with _explained(f"from_pretrained: {str(repo_or_folder)!r} is no folder, and cannot be loaded from the Hub"):
            options: Any = {"revision": revision, "token": token, "cache_dir": cache_dir}
            path = Path(hf_hub_download(str(repo_or_folder), FILE, **options))
    found = load(path, model)
    return found if width is None else extract(found, width).eval()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise what the Hub's client raises as `CheckpointError`."""
    try:
        yield
    except Exception as error:  # of many classes, also those of its HTTP library
        said = (str(error).strip() or "no message").splitlines()[0]
        raise CheckpointError(f"{what} ({type(error).__name__}: {said})") from error
