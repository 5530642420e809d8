"""An extracted network is the plain model in every method, and for other code: its integers describe its layers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import slimmable
from tests.convert import oracles
from tests.convert.test_zoo import SMALLEST

# -- timm's models: all their methods
SAMPLE = ("byobnet", "fastvit", "levit", "repvit", "resnet", "vision_transformer")
MERGES = ("fuse", "reparameterize", "switch_to_deploy")


def own_methods(module: nn.Module) -> list[str]:
    """The public methods that can be called without arguments, except those of every module."""
    found = []
    for name in set(dir(type(module))) - set(dir(nn.Module)):
        static = inspect.getattr_static(type(module), name)
        method = None if name.startswith("_") or isinstance(static, (staticmethod, property)) else getattr(module, name)
        if callable(method) and not isinstance(method, nn.Module):
            try:
                inspect.signature(method).bind()
                found.append(name)
            except TypeError:
                pass
    return sorted(found)


def called(module: nn.Module, name: str) -> Any:
    """What a method returns, or the error that it raises, on a copy."""
    try:
        with torch.no_grad():
            return getattr(copy.deepcopy(module), name)()
    except Exception as error:
        return error


def merged(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy whose blocks have merged their branches, and how many have."""
    twin, count = copy.deepcopy(model), 0
    for path, module in list(twin.named_modules()):
        for name in set(MERGES) & set(own_methods(module)):
            new = getattr(module, name)()
            count += 1
            if isinstance(new, nn.Module) and path:
                parent, _, own = path.rpartition(".")
                setattr(twin.get_submodule(parent), own, new)
    return twin, count


@pytest.mark.parametrize(
    "module", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in SMALLEST]
)
@torch.no_grad()
def test_every_method_of_an_extracted_network_does_what_that_of_a_plain_one_does(module):
    torch.manual_seed(0)
    model = oracles.randomise(timm.create_model(SMALLEST[module]).eval())
    small = slimmable.extract(slimmable.slimify(model, (1.0, 0.5)), 0.5)
    plain, seen = dict(model.named_modules()), set()
    for path, own in small.named_modules():
        for name in own_methods(own):
            if (type(own), name) not in seen:
                seen.add((type(own), name))
                got, expected = called(own, name), called(plain[path], name)
                assert type(got) is type(expected), (path, name, got)
                assert not isinstance(got, (bool, str)) or got == expected, (path, name)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    twin, count = merged(small)
    if count:
        assert oracles.difference(oracles.first_output(twin(x)), oracles.first_output(small(x))) < 1e-4
    small.reset_classifier(7)
    model.reset_classifier(7)
    assert oracles.first_output(small(x)).shape == oracles.first_output(model(x)).shape


# -- integers of anybody's modules
class Block(nn.Module):
    """What only `fused` and other code read: sizes that follow, and equal numbers that are no sizes."""

    def __init__(self, inp: int, out: int, kernel: int):
        super().__init__()
        self.in_chs, self.out_planes, self.groups = inp, out, 1
        self.kernel_size, self.img_size, self.window_size, self.num_hidden_layers = kernel, (out, out), out, out
        self.conv, self.skip = nn.Conv2d(inp, out, kernel, padding=kernel // 2), nn.Conv2d(inp, out, 1)
        self.depthwise = nn.Conv2d(out, out, 3, padding=1, groups=out)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(self.conv(x) + self.skip(x)).relu()

    def fused(self) -> nn.Conv2d:
        conv = nn.Conv2d(self.in_chs, self.out_planes, self.kernel_size, padding=self.kernel_size // 2)
        pad = [self.kernel_size // 2] * 4
        conv.weight.data = self.conv.weight + nn.functional.pad(self.skip.weight, pad)
        conv.bias.data = self.conv.bias + self.skip.bias
        return conv


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.dims, self.embed_dim, self.num_features, self.image_size, self.num_classes = [16, 24], 24, 24, 24, 16
        self.stem, self.block = nn.Conv2d(3, 16, 3, padding=1), Block(16, 24, 7)
        self.head = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("universal", [False, True])
def test_integers_that_only_other_methods_read_follow_the_layers_that_they_describe(universal):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    slim = slimmable.slimify(Network(), (1.0, 0.5), example_inputs=x, universal=universal)
    for width in (1.0, 0.5, *([0.75] if universal else [])):
        block = slimmable.extract(slim, width).block
        assert (block.in_chs, block.out_planes) == (16 * width, 24 * width)
        assert block.depthwise.groups == block.depthwise.in_channels == 24 * width
        assert (block.kernel_size, block.img_size, block.window_size, block.num_hidden_layers) == (7, (24, 24), 24, 24)
        y = torch.randn(2, block.in_chs, 8, 8)
        torch.testing.assert_close(block.fused()(y), block.conv(y) + block.skip(y))
    small = slimmable.extract(slim, 0.5)
    assert (small.embed_dim, small.num_features, small.image_size, small.num_classes) == (12, 12, 24, 16)
    assert small.dims == [16, 12]  # 16 is also the number of scores, which stays
    assert (slim.block.in_chs, slim.dims) == (16, [16, 24])  # the model's own stay full, at every width


def test_an_extraction_describes_the_nearest_layers():
    """Two streams of the same full width keep different numbers of channels."""
    first, second = (nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2))
    for part in (first, second):
        part.hidden_dim = part[0].hidden_dim = 16
    slim = slimmable.slimify(nn.Sequential(first, second), (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    small = slimmable.extract(slim, {"0.0": 0.5, "1.0": 0.25})
    assert [part.hidden_dim for part in small] == [8, 4]
    assert [part[0].hidden_dim for part in small] == [8, 4]


# -- configurations
def tiny(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **more}


IMAGE, TEXT = tiny(image_size=32, patch_size=8), tiny(vocab_size=50, max_position_embeddings=32)
PIXELS, WORDS = torch.zeros(2, 3, 32, 32), torch.arange(18).view(2, 9)
CONFIGURED = {
    "ViTForImageClassification": ("ViTConfig", IMAGE, {"pixel_values": PIXELS}),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        {"pixel_values": PIXELS},
    ),
    "ConvNextV2Model": (
        "ConvNextV2Config",
        {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 2]},
        {"pixel_values": PIXELS},
    ),
    "BertForSequenceClassification": ("BertConfig", TEXT, {"input_ids": WORDS}),
    "GPT2Model": ("GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"input_ids": WORDS}),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
        {"input_ids": WORDS, "pixel_values": PIXELS},
    ),
}


def configured(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config, settings, inputs = CONFIGURED[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    return oracles.randomise(model), {
        key: torch.rand_like(x) if x.is_floating_point() else x for key, x in inputs.items()
    }


@pytest.mark.parametrize("name", CONFIGURED)
@torch.no_grad()
def test_a_model_of_transformers_is_saved_and_loaded_at_every_width(name, tmp_path):
    model, inputs = configured(name)
    before = model.config.to_dict()
    slim = slimmable.slimify(model, (1.0, 0.75, 0.5), example_inputs=inputs)
    for width, expected in slimmable.run_widths(slim, **inputs).items():
        small = slimmable.extract(slim, width)
        assert (small.config.to_dict() == before) is (width == 1)
        small.save_pretrained(tmp_path / str(width))
        loaded = type(model).from_pretrained(tmp_path / str(width)).eval()
        for got, wanted in zip(loaded(**inputs).to_tuple(), expected.to_tuple(), strict=True):
            if isinstance(wanted, Tensor):
                torch.testing.assert_close(got, wanted)
    assert slim.config.to_dict() == model.config.to_dict() == before


def test_the_configuration_of_an_extraction_has_its_sizes_and_nothing_else_changed():
    model, inputs = configured("ViTForImageClassification")
    small = slimmable.extract(slimmable.slimify(model, (1.0, 0.5), example_inputs=inputs), 0.5)
    changed = {key: value for key, value in vars(small.config).items() if value != vars(model.config)[key]}
    assert changed == {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    assert small.vit.config is small.config
    part = slimmable.slimify(model.vit, (1.0, 0.5), example_inputs=inputs)
    assert slimmable.extract(part, 0.5).config.hidden_size == 16


def test_a_network_that_no_configuration_makes_is_named_and_refused_by_from_pretrained(tmp_path):
    """Frequencies of rotary positions go by the size of a head, which gets thinner here: no config cuts them."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaModel(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs={"input_ids": WORDS})
    assert slim.layers[0].self_attn.head_dim == 8
    with pytest.warns(UserWarning, match=r"no config of LlamaModel makes .* save it with slimmable\.save"):
        small = slimmable.extract(slim, 0.5)
    assert small.config.hidden_size == 32
    small.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlamaModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_model_of_diffusers_is_saved_and_loaded(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 4}
    model = diffusers.AutoencoderKL(**blocks, **sizes).eval()
    x = torch.randn(1, 3, 16, 16)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    small = slimmable.extract(slim, 0.5)
    small.save_pretrained(tmp_path)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    assert tuple(loaded.config.block_out_channels) == (8, 16)
    torch.testing.assert_close(loaded(x).sample, small(x).sample)
    assert tuple(slim.config.block_out_channels) == (16, 32)
