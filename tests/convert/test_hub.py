"""Networks on the Hub, and in folders like those there: what is written is read again, and its card tells the truth."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

import slimmable
from slimmable.errors import CheckpointError, ConversionError, SlimmableError, UsageError, WidthError
from tests.convert import oracles
from tests.convert.hub_server import serving

WIDTHS = (1.0, 0.5, 0.25)
FILE = "slimmable.safetensors"


@pytest.fixture(scope="module")
def model():
    """A converted model whose widths have BatchNorm statistics of their own."""
    plain = oracles.randomise(timm.create_model("test_resnet", num_classes=10).eval())
    return oracles.randomise(slimmable.slimify(plain, WIDTHS), seed=1).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def outputs(model, x, width=None):
    with torch.no_grad():
        if width is None:
            return model(x)
        with slimmable.at_width(model, width):
            return model(x)


def lines_of(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def narrow(name, width=0.5, **options):
    """The network of one width of a timm model with random weights and statistics, and an input."""
    plain = oracles.randomise(timm.create_model(name, **options).eval())
    slim = slimmable.slimify(plain, (1.0, width))
    size = slimmable._inputs.example_of(plain)[0][0].shape[1:]
    return slimmable.extract(oracles.randomise(slim, seed=1), width).eval(), torch.rand(2, *size)


def test_a_folder_holds_all_widths(model, images, tmp_path):
    slimmable.save_pretrained(model, tmp_path / "resnet")
    again = slimmable.from_pretrained(tmp_path / "resnet")
    assert slimmable.widths_of(again) == WIDTHS
    for width in WIDTHS:
        assert torch.equal(outputs(again, images, width), outputs(model, images, width))
    for width in WIDTHS:
        small, expected = (slimmable.from_pretrained(str(tmp_path / "resnet"), width), slimmable.extract(model, width))
        assert not slimmable.view.state.is_slim(small)
        assert not small.training
        assert torch.equal(outputs(small, images), outputs(expected, images))


NATIVE = ["test_convnext", "test_mambaout", "test_resnet", "test_vit", "test_vit4", "test_vit_relpos", "resnet10t"]
LARGER = [
    "deit_tiny_patch16_224", "densenet121", "levit_128s", "repvgg_a0", "swin_tiny_patch4_window7_224",
    "xcit_nano_12_p16_224",
]  # fmt: skip
OURS_ONLY = ["test_byobnet", "test_efficientnet", "mixer_s32_224", "poolformer_s12", "resnet18"]


@pytest.mark.parametrize("name", [*NATIVE, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_timm_loads_an_extracted_model_whose_sizes_its_arguments_can_say(name, tmp_path):
    small, x = narrow(name, num_classes=7)
    slimmable.save_pretrained(small, tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert type(loaded) is type(small)
    assert torch.equal(outputs(loaded, x), outputs(small, x))
    assert torch.equal(outputs(slimmable.from_pretrained(tmp_path / "small"), x), outputs(small, x))
    assert 'timm.create_model("local-dir:small", pretrained=True)' in lines_of(tmp_path / "small")[1]
    assert ModelCard.load(tmp_path / "small" / "README.md").data.library_name == "timm"


@pytest.mark.parametrize("name", OURS_ONLY)
def test_where_timm_cannot_say_the_sizes_the_card_has_our_line(name, tmp_path, monkeypatch):
    small, x = narrow(name)
    slimmable.save_pretrained(small, tmp_path / "small")
    assert sorted(os.listdir(tmp_path / "small")) == ["README.md", FILE]
    (lines,) = lines_of(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(lines, made)
    assert torch.equal(outputs(made["model"], x), outputs(small, x))
    assert ModelCard.load(tmp_path / "small" / "README.md").data.library_name == "slimmable"


@pytest.mark.parametrize("width", [0.75, 1 / 3])
def test_other_widths_of_a_vision_transformer_load_too(width, tmp_path):
    small, x = narrow("vit_tiny_patch16_224", width, img_size=64, in_chans=1, num_classes=0)
    slimmable.save_pretrained(small, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(outputs(loaded, x), outputs(small, x))


def test_what_timm_loads_but_computes_otherwise_is_not_written(tmp_path):
    small, _ = narrow("test_nfnet")  # its convolutions have a scale that follows from the number of channels
    slimmable.save_pretrained(small, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", FILE]
    small, _ = narrow("test_vit")
    small.blocks[0].mlp.act = nn.ReLU()
    with pytest.warns(UserWarning, match="makes a network unlike this one"):
        slimmable.save_pretrained(small, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", FILE]
    small, _ = narrow("test_vit")
    small.norm.eps = 0.1
    with pytest.warns(UserWarning, match="makes a network unlike this one"):
        slimmable.save_pretrained(small, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", FILE]


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def hugging(name):
    """A model of transformers, and its inputs."""
    transformers = pytest.importorskip("transformers")
    if name == "ViTForImageClassification":
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=5, **SIZES)
        return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.rand(2, 3, 32, 32)}
    config = transformers.BertConfig(vocab_size=50, **SIZES)
    return getattr(transformers, name)(config).eval(), {"input_ids": torch.arange(8)[None]}


def first_of(output):
    return output[0].detach()


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("ViTForImageClassification", "AutoModelForImageClassification"),
        ("BertForTokenClassification", "AutoModelForTokenClassification"),
    ],
)
def test_transformers_load_an_extracted_model(name, auto, tmp_path, monkeypatch):
    plain, inputs = hugging(name)
    small = slimmable.extract(slimmable.slimify(plain, (1.0, 0.5), example_inputs=inputs), 0.5)
    monkeypatch.chdir(tmp_path)
    slimmable.save_pretrained(small, "small", example_inputs=inputs)
    loaded = getattr(pytest.importorskip("transformers"), auto).from_pretrained("small").eval()
    assert loaded.config.hidden_size == 16
    assert torch.equal(first_of(loaded(**inputs)), first_of(small(**inputs)))
    made = {}
    exec(lines_of(tmp_path / "small")[0], made)
    assert torch.equal(first_of(made["model"].eval()(**inputs)), first_of(small(**inputs)))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel"])
def test_the_card_says_how_to_load_what_transformers_cannot(name, tmp_path, monkeypatch):
    plain, inputs = hugging(name)
    slim = slimmable.slimify(plain, (1.0, 0.5), example_inputs=inputs)
    with warnings.catch_warnings(record=True) as caught:
        small = slimmable.extract(slim, 0.5)
    cannot = [str(each.message) for each in caught if "from_pretrained would refuse" in str(each.message)]
    monkeypatch.chdir(tmp_path)
    found = {}
    for folder, model in ("all", slim), ("small", small):
        slimmable.save_pretrained(model, folder, example_inputs=inputs)
        made = found[folder] = {}
        exec(lines_of(tmp_path / folder)[0], made)
        assert torch.equal(first_of(made["model"].eval()(**inputs)), first_of(model(**inputs)))
    assert torch.equal(first_of(found["all"]["small"](**inputs)), first_of(small(**inputs)))
    assert ("slimmable" in found["small"]) == bool(cannot) == (name == "BertModel")


def test_a_network_of_ones_own_needs_the_plain_one(tmp_path):
    x = torch.rand(3, 4)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=x)
    slimmable.save_pretrained(slim, tmp_path, example_inputs=x)
    with pytest.raises(CheckpointError, match="no recipe for timm"):
        slimmable.from_pretrained(tmp_path)
    again = slimmable.from_pretrained(tmp_path, 0.5, model=net)
    assert torch.equal(outputs(again, x), outputs(slim, x, 0.5))
    assert "from_pretrained(" in lines_of(tmp_path)[0]
    assert "model=plain" in lines_of(tmp_path)[0]


def test_the_card_has_the_numbers_of_every_width_and_what_was_given(model, tmp_path):
    accuracy = {1.0: {"knn": 0.5, "top-1": 0.625}, 0.25: {"top-1": 0.25}}
    given = {"accuracy": accuracy, "license": "apache-2.0"}
    slimmable.save_pretrained(model, tmp_path / "resnet", repo_id="me/resnet", **given)
    card = ModelCard.load(tmp_path / "resnet" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "slimmable",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "slimmable"],
    }
    shares = {1.0: "50.0 | 62.5 |", 0.5: " |  |", 0.25: " | 25.0 |"}
    for row in slimmable.profile(model, repeats=0).rows:
        numbers = f"| {row.width:g} | {row.parameters:,} | {row.macs:,} | {row.activations:,} |"
        assert f"{numbers} {shares[row.width]}\n" in card.text
    assert "kNN, % | top-1, % |" in card.text
    assert 'timm.create_model("test_resnet", num_classes=10)' in card.text
    assert 'slimmable.from_pretrained("me/resnet", width=0.25)' in card.text


CLIENT = """
import timm
import torch
import slimmable

torch.manual_seed(0)
x = torch.rand(2, 3, 160, 160)
model = slimmable.slimify(timm.create_model("test_resnet", num_classes=3), (1.0, 0.5)).eval()
url = slimmable.push_to_hub(model, "me/all", private=True, token="hf_secret", license="mit")
assert "/me/all/commit/" in url, url
again = slimmable.from_pretrained("me/all", token="hf_secret")
with slimmable.at_width(model, 0.5), slimmable.at_width(again, 0.5), torch.no_grad():
    assert torch.equal(model(x), again(x))
small = slimmable.extract(model, 0.5)
assert torch.equal(slimmable.from_pretrained("me/all", 0.5)(x), small(x))

slimmable.push_to_hub(small, "me/half")
assert torch.equal(slimmable.from_pretrained("me/half", revision="main")(x), small(x))
assert torch.equal(timm.create_model("hf-hub:me/half", pretrained=True).eval()(x), small(x))
slimmable.push_to_hub(model, "me/half")

for place, options in ("me/none", {}), ("me/half", {"revision": "none"}), ("a/b/c", {}):
    try:
        slimmable.from_pretrained(place, **options)
    except slimmable.errors.CheckpointError as error:
        assert place in str(error), error
    else:
        raise AssertionError(place)
"""


def test_the_hub_gives_back_what_was_pushed(tmp_path):
    with serving() as hub:
        paths = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd(), "HF_ENDPOINT": hub.address}
        own = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        run = subprocess.run(
            [sys.executable, "-c", CLIENT], env=os.environ | paths | own, cwd=tmp_path, capture_output=True, text=True
        )
    assert run.returncode == 0, run.stderr
    assert hub.private["me/all"]
    assert not hub.private["me/half"]
    assert "Bearer hf_secret" in hub.tokens
    assert hub.files["me/all", "main"].keys() == {"README.md", FILE}
    assert 'from_pretrained("me/all"' in hub.files["me/all", "main"]["README.md"].decode()
    assert hub.files["me/half", "main"].keys() == {"README.md", FILE}  # what timm read of the network before is gone


def test_a_hub_that_is_not_there_is_an_error_and_changes_nothing(model, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="'me/resnet' cannot be pushed"):
        slimmable.push_to_hub(model, "me/resnet")
    with pytest.raises(UsageError, match="nothing"):
        slimmable.push_to_hub(model, "me/resnet", nothing=1)


def test_what_is_wrong_is_refused_before_anything_is_written(model, tmp_path):
    folder = tmp_path / "new"
    for wrong, kind in (
        ({"accuracy": {0.3: {"knn": 0.5}}}, WidthError),
        ({"accuracy": {0.5: {"knn": 50}}}, UsageError),
        ({"accuracy": {0.5: 0.5}}, SlimmableError),
        ({"license": ""}, UsageError),
        ({"arguments": {"num_classes": 11}}, CheckpointError),
    ):
        with pytest.raises(kind):
            slimmable.save_pretrained(model, folder, **wrong)
        assert not folder.exists()


def test_a_folder_of_another_network_is_left_as_it_is(model, tmp_path):
    small = slimmable.extract(model, 0.5)
    slimmable.save_pretrained(small, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(CheckpointError, match=r"has the config.json of another network"):
        slimmable.save_pretrained(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    with pytest.raises(ConversionError, match="was never converted"):
        slimmable.from_pretrained(tmp_path, 0.5)


def test_damaged_and_missing_files_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"slimmable\.safetensors"):
        slimmable.from_pretrained(tmp_path)
    slimmable.save_pretrained(model, tmp_path)
    data = bytearray((tmp_path / FILE).read_bytes())
    data[-100] ^= 1
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        slimmable.from_pretrained(tmp_path)


def test_the_arguments_for_timm_are_plain_data(tmp_path):
    small, _ = narrow("test_resnet", num_classes=7)
    slimmable.save_pretrained(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["model_args"].items() >= {"stem_width": 8, "channels": [16, 24, 24, 48], "num_classes": 7}.items()
