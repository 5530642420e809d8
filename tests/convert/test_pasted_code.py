"""Idioms of pasted research code: distributions, branches of training, state that a forward leaves, new tensors."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import slimmable
from tests.convert.oracles import run_on
from tests.convert.test_numbers import checked, half, made


class Policy(nn.Module):
    """Of an actor and critic: a distribution made in the forward, which looks at the numbers that it is made from."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 64), nn.Tanh()), nn.Linear(64, 3)
        self.log_std, self.kind = nn.Parameter(torch.zeros(3)), kind

    def forward(self, x):
        found = self.head(self.body(x))
        if self.kind == "normal":
            chosen = torch.distributions.Normal(found, self.log_std.exp())
            return chosen.mean, chosen.log_prob(found).sum(-1), chosen.entropy().sum(-1)
        chosen = torch.distributions.Categorical(logits=found)
        return chosen.probs, chosen.log_prob(torch.zeros(len(x))), chosen.entropy()


@pytest.mark.parametrize("checks", [True, False])  # torch.compile turns them off for the whole process
@pytest.mark.parametrize("kind", ["normal", "categorical"])
def test_a_distribution_may_be_made_in_the_forward(kind, checks, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", checks)
    assert half(checked(made(Policy(kind)), torch.randn(5, 4, dtype=torch.float64))) < 0.55
    with pytest.raises(ValueError, match="constraint") if checks else nullcontext():  # as before
        torch.distributions.Normal(torch.zeros(2), -torch.ones(2))


class Replacing(nn.Linear):
    """Limits the norm of its weights by writing them anew in each forward."""

    def forward(self, x):
        self.weight.data = self.weight.data / self.weight.data.norm(dim=1, keepdim=True).clamp(min=1)
        return super().forward(x)


def test_weights_that_the_forward_replaces_stay_full():
    body = nn.Linear(6, 32), nn.ReLU(), Replacing(32, 16), nn.ReLU()
    model = made(nn.Sequential(*body, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    with torch.no_grad():
        model[2].weight.mul_(20)
    x = torch.randn(5, 6, dtype=torch.float64)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    small = slimmable.extract(slim, 0.5)
    with torch.no_grad():
        slim[2].weight.mul_(20)  # as a training step may
        small[2].weight.mul_(20)
    with slimmable.at_width(slim, 0.5):
        torch.testing.assert_close(slim(x), small(x))
    plan = slimmable.plan(slim)
    assert "the forward replaces its data" in str(plan)
    assert small[2].weight.shape == (16, 32)
    assert small[4].weight.shape == (16, 16)


class Calls(nn.Module):
    def __init__(self, called):
        super().__init__()
        self.called = called

    def forward(self, x):
        return self.called(x)


ALWAYS = {"p": 1e-9, "training": True}  # dropout in eval mode too, to estimate uncertainty


@pytest.mark.parametrize(
    "called",
    [
        lambda x: F.pad(x, (1, 1, 2, 0), mode="circular"),
        lambda x: F.dropout2d(x, **ALWAYS),
        lambda x: F.dropout2d(x, inplace=True, **ALWAYS),
        lambda x: F.feature_alpha_dropout(x, **ALWAYS),
    ],
    ids=["circular padding", "dropout of channels", "in place", "of alpha"],
)
def test_what_an_operation_makes_inside_has_the_units_of_its_input(called):
    """torch fills a new tensor, whose size nobody asked for, from the input."""
    body = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Calls(called), nn.Conv2d(16, 32, 3), nn.ReLU()
    model = made(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))
    assert half(checked(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))) < 0.35


class MaxNorm(nn.Module):
    def forward(self, weights):
        return weights.renorm(2, 0, 1.0)


class Sorted(nn.Module):
    """Computes weights in a way that needs all of them."""

    def forward(self, weights):
        return weights.flatten().sort().values.view_as(weights)


def depthwise(limit):
    """The beginning of EEGNet: a depthwise convolution over the electrodes, whose weights are computed."""
    over = nn.Conv2d(8, 16, (8, 1), groups=8, bias=False)
    parametrize.register_parametrization(over, "weight", limit)
    body = nn.Conv2d(1, 8, (1, 9)), over, nn.BatchNorm2d(16), nn.ELU()
    return made(nn.Sequential(*body, nn.Conv2d(16, 24, (1, 5)), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@pytest.mark.parametrize(("limit", "units"), [(MaxNorm(), 8), (Sorted(), 16)])
def test_a_depthwise_convolution_follows_its_weights(limit, units):
    model, x = depthwise(limit), torch.randn(2, 1, 8, 32, dtype=torch.float64)
    checked(model, x, widths=(1.0, 0.75, 0.5))
    small = slimmable.extract(slimmable.slimify(model, (1.0, 0.75, 0.5), example_inputs=x), 0.5)
    assert small[1].weight.shape[0] == units


def test_an_extracted_activation_tells_its_parameters():
    net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2), nn.PReLU())
    small = slimmable.extract(slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.randn(2, 4)), 0.5)
    assert [each.num_parameters for each in small if isinstance(each, nn.PReLU)] == [4, 1]


class Sparse(nn.Module):
    """Attention of the queries that choose most clearly (Informer); all others get the mean of the values."""

    def __init__(self):
        super().__init__()
        self.heads, self.out = 4, nn.Linear(32, 5)
        self.q, self.k, self.v = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(6, 32)

    def forward(self, x):
        size, steps, _ = x.shape
        q, k, v = (layer(x).view(size, steps, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1)
        chosen = (scores.amax(-1) - scores.mean(-1)).topk(3, sorted=False)[1]
        at = torch.arange(size)[:, None, None], torch.arange(self.heads)[None, :, None], chosen
        seen = v.mean(-2, keepdim=True).expand(-1, -1, steps, -1).clone()
        seen[(*at, slice(None))] = (q[at] @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(seen.transpose(1, 2).reshape(size, steps, -1))


def test_what_is_written_at_indices_stays_full_only_along_their_axes():
    assert half(checked(made(Sparse()), torch.randn(2, 8, 6, dtype=torch.float64))) < 0.6


# -- what only training reads
class Auxiliary(nn.Module):
    """Gives the scores of a second classifier too in training, as GoogLeNet and Inception do."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self.aux = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 7))

    def forward(self, x):
        early = torch.relu(self.first(x))
        scores = self.out(torch.relu(self.second(early)))
        return (scores, self.aux(early)) if self.training else scores


class Identifying(nn.Module):
    """Gives features to compare, and in training the scores of a classifier, as networks that find persons again do."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = nn.Sequential(nn.Linear(8, 64), nn.ReLU()), nn.Linear(64, 7)

    def forward(self, x):
        found = self.features(x)
        return self.classifier(found) if self.training else found


class Codebook(nn.Module):
    """Quantizes vectors to the nearest ones of a table, which follows them in training, as VQ-VAE's."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))
        self.decoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        self.register_buffer("table", torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("sums", self.table.clone())

    def forward(self, x):
        found = self.encoder(x)
        nearest = (found[:, None] - self.table).square().sum(-1).argmin(1)
        if self.training:
            chosen = F.one_hot(nearest, 16).to(found.dtype).detach()
            self.sums.mul_(0.9).add_(chosen.T @ found.detach(), alpha=0.1)
            self.table.copy_(self.sums / (0.1 + chosen.sum(0))[:, None])
        return self.decoder(found + (self.table[nearest] - found).detach())


class Masking(nn.Module):
    """Puts a vector in the place of some steps in training, and norms others apart, as wav2vec 2.0 and DINOv3 do."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self.norm, self.other, self.mask = nn.LayerNorm(64), nn.LayerNorm(64), nn.Parameter(torch.ones(64))

    def forward(self, x):
        found = self.first(x)
        if self.training:
            found = torch.cat([self.other(found[:2]), found[2:]])
            found[torch.arange(len(x)) % 3 == 0] = self.mask.to(found.dtype)
        return self.out(torch.relu(self.second(self.norm(found))))


@pytest.mark.parametrize("kind", [Auxiliary, Identifying, Codebook, Masking])
def test_what_only_training_reads_gets_thinner_too(kind):
    model, x = made(kind()), torch.randn(6, 8, dtype=torch.float64)
    assert half(checked(model, x)) < 0.55
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x).train()
    small, run = slimmable.extract(slim, 0.5).train(), run_on(x)
    with slimmable.at_width(slim, 0.5):
        for _ in range(2):  # what the first step has left counts in the second
            assert all(map(torch.equal, run(slim), run(small)))
    assert not any(module.training for module in model.modules())
    assert [each.shape for each in run(slim)] == [each.shape for each in run(copy.deepcopy(model).train())]


def test_gates_do_not_count_what_only_training_does():
    model, x = Auxiliary(), torch.randn(2, 8)
    plain = Auxiliary()
    del plain.aux
    plans = [slimmable.plan(each, (1.0, 0.5), example_inputs=x) for each in (model, plain)]
    assert plans[0].columns[0].macs == plans[1].columns[0].macs
    assert [output.name for output in plans[0].channels.outputs] == ["output"]


# -- state that a forward leaves behind
class Hooked(nn.Module):
    """Collects hidden states by hooks that its first forward registers, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 16)])
        self.heads = nn.ModuleList([nn.Linear(32, 5), nn.Linear(64, 5), nn.Linear(16, 5)])
        self.hooked, self.seen = False, []

    def forward(self, x):
        if not self.hooked:
            self.hooked = True
            for layer in self.layers:
                layer.register_forward_hook(lambda layer, args, output: self.seen.append(output))
        self.seen.clear()
        for layer in self.layers:
            x = torch.relu(layer(x))
        return [head(each) for head, each in zip(self.heads, self.seen, strict=True)]


def test_hooks_that_a_forward_registers_are_registered_once():
    model = made(Hooked())
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=torch.randn(2, 8, dtype=torch.float64))
    assert not any(module._forward_hooks for module in (*model.modules(), *slim.modules()))
    assert slimmable.extract(slim, 0.5).heads[1].weight.shape == (5, 32)


class Membrane(nn.Module):
    """Keeps its state in a buffer that is empty before the first step, as spiking neurons do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.register_buffer("state", torch.zeros(0), persistent=False)

    def forward(self, x):
        current = self.first(x)
        self.state = torch.zeros_like(current)
        self.state = 0.9 * self.state + current
        return self.last(self.state)


def test_a_buffer_may_begin_empty():
    assert half(checked(made(Membrane()), torch.randn(2, 8, dtype=torch.float64))) < 0.55


class Centred(nn.Module):
    """Keeps a mean in an attribute that it does not have before, as normalizations of series do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        self.mean = x.mean(1, keepdim=True)
        return self.last(torch.relu(self.first(x - self.mean))) + self.mean


def test_a_file_of_a_network_that_has_run_loads_into_one_that_has_not(tmp_path):
    model, x = Centred(), torch.randn(2, 16)
    model(x)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    slimmable.save(slim, tmp_path / "net.safetensors")
    loaded = slimmable.load(tmp_path / "net.safetensors", Centred())
    for width in (1.0, 0.5):
        with slimmable.at_width(slim, width), slimmable.at_width(loaded, width):
            assert torch.equal(loaded(x), slim(x))


class Slots:
    """Answers no question for attributes that it does not have, as objects of pydantic do."""

    __slots__ = ("value",)

    def __getattr__(self, name):
        raise TypeError(name)


class Configured(nn.Sequential):
    settings = Slots()

    def forward(self, x):
        return super().forward(x) if self.settings else x


def test_an_object_in_a_model_may_refuse_to_be_asked():
    model = Configured(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    assert slimmable.plan(model, (1.0, 0.5), example_inputs=torch.randn(2, 8)).columns[1].counts == (16,)


# -- sizes that are equal by chance, and numbers that are known
class Recurrent(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.size, self.start = 32, start
        self.cell, self.out = nn.GRUCell(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        state = self.start(x, self.size)
        for _ in range(2):
            state = self.cell(x, state)
        return self.out(state)


@pytest.mark.parametrize(
    "start",
    [
        lambda x, size: torch.zeros(x.shape[0], size, dtype=x.dtype),
        lambda x, size: torch.full((len(x), size), 2.0, dtype=x.dtype),
        lambda x, size: x.new_zeros((x.size(0), size)),
        lambda x, size: x.new(x.shape[0], size).zero_(),
    ],
    ids=["zeros", "full", "new_zeros", "new"],
)
@pytest.mark.parametrize("batch", [2, 32])
def test_a_new_tensor_follows_the_size_at_its_place(start, batch):
    """Also if the batch is as large as the hidden state."""
    assert half(checked(made(Recurrent(start)), torch.randn(batch, 8, dtype=torch.float64))) < 0.35


class Table(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.tokens, self.inner, self.out = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.register_buffer("places", torch.randn(50, 32))
        self.register_buffer("even", torch.arange(7) % 2 == 0)
        self.read = read

    def forward(self, tokens, at):
        return self.out(torch.relu(self.inner(self.read(self, self.tokens(tokens), at))))


@pytest.mark.parametrize(
    "read",
    [
        lambda self, found, at: found + self.places[at],
        lambda self, found, at: found + F.embedding(at, self.places),
        lambda self, found, at: found[:, self.even],
    ],
    ids=["indexed", "embedded", "by a mask"],
)
def test_a_table_may_be_read_at_known_places(read):
    tokens, at = torch.randint(0, 20, (2, 7)), torch.arange(7)
    assert half(checked(made(Table(read)), tokens, at)) < 0.4


class Quarter(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 64), nn.Linear(16, 16), nn.Linear(16, 3)
        self.size = size

    def forward(self, x):
        found = torch.relu(self.first(x))
        return self.out(torch.relu(self.second(found[:, : self.size(found.shape[1])])))


def test_a_size_may_be_shifted_and_one_that_does_not_follow_is_named():
    x = torch.randn(2, 8)
    slim = slimmable.slimify(Quarter(lambda units: units >> 2), (1.0, 0.5), example_inputs=x)
    assert slimmable.extract(slim, 0.5).second.weight.shape == (8, 8)
    with pytest.raises(slimmable.errors.TraceError, match=r"int\(c / 4\) does not, c // 4 does"):
        slimmable.slimify(Quarter(lambda units: int(units / 4)), (1.0, 0.5), example_inputs=x)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu().numpy(), batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_known_numbers_may_go_through_numpy():
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    assert half(checked(made(Packed()), x, torch.tensor([6, 4, 2]))) < 0.35


def test_a_layer_like_a_converted_one_is_made_by_its_class():
    """As PEFT makes the layers of LoRA."""
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    slim = slimmable.slimify(net, (1.0, 0.5), example_inputs=x)
    new = type(slim[0])(3, 16, kernel_size=1)
    assert type(new) is nn.Conv2d
    assert new(x).shape == (2, 16, 8, 8)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(slimmable.run_widths(twin, x)[0.5], slimmable.run_widths(slim, x)[0.5])


class Kernel(nn.Module):
    """A layer of functions of each input: weights of a Kolmogorov-Arnold network, or centres of a radial basis."""

    def __init__(self, inputs, units, kind):
        super().__init__()
        self.kind, self.bias = kind, nn.Parameter(torch.zeros(units))
        self.weight = nn.Parameter(
            torch.randn(units, inputs, *([4] if kind == "functions" else []), dtype=torch.float64)
        )

    def forward(self, x):
        if self.kind == "functions":
            found = torch.stack([x, x.sin(), x.cos(), x.tanh()], -1)
            return (found[..., None, :, :] * self.weight).sum((-1, -2)) + self.bias
        return (-(x[:, None] - self.weight).square().mean(-1)).exp() + self.bias


def test_products_written_out_are_products_of_matrices():
    x = torch.randn(3, 8, dtype=torch.float64)
    layers = [Kernel(inputs, units, "functions") for inputs, units in ((8, 32), (32, 16), (16, 4))]
    plan = checked(made(nn.Sequential(*layers)), x, widths=(1.0, 0.5))
    assert [group.units for group in plan.groups] == [32, 16]  # the last makes class scores


def test_the_plan_names_weights_whose_units_no_layer_makes():
    net = nn.Sequential(Kernel(8, 32, "centres"), nn.Linear(32, 4))
    with pytest.warns(UserWarning, match="nothing in this Sequential gets narrower"):
        slim = slimmable.slimify(net, example_inputs=torch.randn(3, 8))
    reasons = {pin.axis: pin.reason for pin in slimmable.plan(slim).pins}
    assert reasons["0", "weight", 0] == "no product, convolution or lookup makes its units from features"


class Colours(nn.Conv2d):
    """As in EDSR, which normalizes colours by a frozen convolution."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1)

    def freeze(self):
        scales = torch.rand(self.out_channels, dtype=self.weight.dtype)
        self.requires_grad_(False).weight.copy_(scales.diag()[..., None, None])


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_scales_of_colours_mix_no_colours(frozen):
    inner = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Colours(16), nn.Conv2d(16, 3, 3, padding=1)
    model = made(nn.Sequential(Colours(3), *inner, Colours(3)))
    for each in (model[0], model[3], model[5]) if frozen else ():
        each.freeze()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    checked(model, x, widths=(1.0, 0.5))
    small = slimmable.extract(slimmable.slimify(model, (1.0, 0.5), example_inputs=x), 0.5)
    assert [small[at].weight.shape[0] for at in (0, 1, 3, 4)] == ([3, 8, 8, 3] if frozen else [2, 8, 8, 2])


class Captions(nn.Module):
    """Writes the scores of each step, or what it feels, into a tensor made before."""

    def __init__(self, kind):
        super().__init__()
        self.words, self.kind = 20, kind
        self.embed, self.cell, self.head = nn.Embedding(20, 16), nn.GRUCell(16, 32), nn.Linear(32, 20)

    def forward(self, tokens):
        steps, batch = tokens.shape
        found = torch.zeros(steps, batch, self.words, dtype=torch.float64)
        if self.kind == "batch first":
            found = found.transpose(0, 1)
        state = None
        for step in range(1, steps):
            state = self.cell(self.embed(tokens[step]), state)
            scores = self.head(state)
            if self.kind == "batch first":
                found[:, step, :] = scores
            else:
                found[step] = scores.relu() if self.kind == "rectified" else scores
        return found


@pytest.mark.parametrize("kind", ["steps first", "batch first", "rectified"])
def test_scores_that_are_written_step_by_step_are_scores(kind):
    plan = checked(made(Captions(kind)), torch.randint(20, (4, 3)))
    scores = plan.output_shapes[1][0][-1]
    assert scores == (10 if kind == "rectified" else 20)


def farthest(points, count):
    """As written for PointNet++: the points that lie farthest from those before."""
    rows = torch.arange(len(points))
    found, last = torch.zeros(len(points), count, dtype=torch.long), torch.zeros(len(points), dtype=torch.long)
    nearest = torch.full(points.shape[:2], 1e10, dtype=points.dtype)
    for at in range(count):
        found[:, at] = last
        distances = (points - points[rows, last].unsqueeze(1)).square().sum(-1)
        nearer = distances < nearest
        nearest[nearer] = distances[nearer]
        last = nearest.max(-1).indices
    return points[rows[:, None], found]


class Chosen(nn.Module):
    """Reads what features choose: where they are large, or the points that lie farthest apart."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.score = nn.Linear(3, 32), nn.Linear(32, 1)
        self.mix, self.head, self.kind = nn.Linear(32, 32), nn.Linear(32, 4), kind

    def forward(self, points):
        if self.kind == "farthest":
            points = farthest(points, 3)
        x = self.body(points).relu()
        scores = self.score(x).squeeze(-1)
        if self.kind == "mask":
            x = x[scores > -100]
        if self.kind == "numbers":
            rows, columns = torch.nonzero(scores > -100, as_tuple=True)
            x = x[rows, columns]
        if self.kind == "fill":
            x[x > 1] = 1
            x[:, scores[0] < 0] = 0
        if self.kind == "in place":
            scores[scores < 0] += 1
            x = x * scores.unsqueeze(-1)
        return self.head(self.mix(x).relu())


@pytest.mark.parametrize("kind", ["farthest", "mask", "numbers", "fill", "in place"])
def test_masks_made_from_features_may_choose(kind):
    assert half(checked(made(Chosen(kind)), torch.randn(2, 9, 3, dtype=torch.float64))) < 0.5


class Steps(nn.Module):
    """A recurrent layer that runs along the channels of a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv1d(3, 8, 3), nn.RNN(6, 9, batch_first=True), nn.Linear(9, 5)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x))[0])


def test_channels_that_are_steps_of_a_recurrent_layer_keep_their_order():
    plan = checked(made(Steps()), torch.randn(2, 3, 8, dtype=torch.float64))
    assert "are steps of a recurrent layer" in str(plan)


class Sampled:
    """Weights in an object, as published for Bayesian layers."""

    def __init__(self, mean):
        self.mean = mean

    def weight(self):
        return self.mean * 2


class Hidden(nn.Module):
    """Reads weights where it is not their attribute: in a list, in an object, in a module that it keeps in a dict."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(6, 32), nn.Linear(32, 3), kind
        layer = nn.Linear(32, 32, bias=False)
        self.weights = nn.ParameterList(layer.parameters())
        self.held = {"list": [layer.weight], "object": Sampled(layer.weight), "module": {"layer": [layer]}}[kind]

    def forward(self, x):
        x = self.first(x).relu()
        if self.kind == "module":
            return self.last(self.held["layer"][0](x).relu())
        return self.last(F.linear(x, self.held[0] if self.kind == "list" else self.held.weight()).relu())


@pytest.mark.parametrize("kind", ["list", "object", "module"])
def test_weights_that_no_width_reaches_stay_full(kind):
    model = made(Hidden(kind))
    plan = checked(model, torch.randn(4, 6, dtype=torch.float64))
    assert "no width reaches weights in a list, an object or a module outside of the model" in str(plan)
    assert not plan.groups
    assert model.weights[0].shape == (32, 32)


class Warp(nn.Module):
    """Reads an image at the places that a layer makes, as networks for optical flow do."""

    def __init__(self):
        super().__init__()
        self.body, self.flow = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 2, 3, padding=1)
        self.mix, self.head = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.body(x).relu()
        places = self.flow(x).permute(0, 2, 3, 1).tanh()
        return self.head(self.mix(F.grid_sample(x, places, align_corners=False)).relu())


def test_places_in_an_image_may_be_made_by_a_layer():
    assert half(checked(made(Warp()), torch.randn(2, 3, 8, 8, dtype=torch.float64))) < 0.5


class Spikes(nn.Module):
    """Neurons whose potential begins as a number, and a grid that is made for the size of the image."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.potential = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), 0.0
        self.grid = torch.zeros(1)

    def forward(self, x):
        self.potential = 0.5 * self.potential + self.first(x)
        x = self.last((self.potential > 0.5).double())
        if self.grid.shape[2:4] != x.shape[2:4]:
            self.grid = torch.rand(1, 1, *x.shape[2:], 2)
        x = x.unflatten(1, (1, 8)).permute(0, 1, 3, 4, 2)
        return torch.cat([x[..., :2] + self.grid, x[..., 2:]], -1)


def test_a_file_of_a_network_that_has_run_does_not_depend_on_what_it_has_kept(tmp_path):
    model, x = made(Spikes()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x)
    model.potential = 0.0
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    slimmable.save(slim, tmp_path / "model.safetensors")
    loaded = slimmable.load(tmp_path / "model.safetensors", Spikes().double())
    for width in (1.0, 0.5):
        for network in (slim, loaded):
            slimmable.set_width(network, width)
        assert slim(x).shape == loaded(x).shape == (2, 1, 6, 6, 8)


class Blocks(nn.Module):
    """Multiplies blocks of channels, whose size is an attribute (AFNO); and a recurrent layer with projections."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn = nn.Linear(6, 32), nn.LSTM(32, 64, proj_size=32, batch_first=True)
        self.block_size, self.weight, self.head = 8, nn.Parameter(torch.randn(4, 8, 8)), nn.Linear(32, 3)

    def forward(self, x):
        x, _ = self.rnn(self.first(x))
        blocks = x.unflatten(-1, (-1, self.block_size))
        return self.head(torch.einsum("bnki,kio->bnko", blocks, self.weight).flatten(2))


def test_an_extracted_network_is_loaded_by_what_its_weights_say_of_its_sizes(tmp_path):
    model, x = made(Blocks()), torch.randn(2, 5, 6, dtype=torch.float64)
    small = slimmable.extract(slimmable.slimify(model, (1.0, 0.5), example_inputs=x), 0.5)
    slimmable.save(small, tmp_path / "small.safetensors")
    loaded = slimmable.load(tmp_path / "small.safetensors", Blocks().double())
    assert (loaded.rnn.proj_size, loaded.block_size) == (small.rnn.proj_size, small.block_size) == (16, 4)
    assert torch.equal(loaded(x), small(x))


class Scaled(nn.Sequential):
    """Runs its layers with other weights than it has, as hypernetworks and meta-learning do."""

    def forward(self, x):
        weights = {name: 2 * weight for name, weight in self[0].named_parameters()}
        return self[2](self[1](torch.func.functional_call(self[0], weights, (x,))))


def test_inference_takes_the_weights_that_a_forward_gives_to_a_layer():
    model, x = made(Scaled(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))), torch.randn(4, 6, dtype=torch.float64)
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=x)
    with torch.no_grad(), slimmable.at_width(slim, 0.5):
        expected = slim(x)
        with slimmable.inference(slim):
            assert torch.equal(slim(x), expected)
            assert torch.equal(slim(x), expected)


class Positions(nn.Module):
    """Moves a table, a plain tensor, to where its input is; and writes keys into one (LLaMA)."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.mix, self.last, self.kind = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3), kind
        self.table = torch.randn(4, 9, 32, dtype=torch.float32 if kind == "type" else torch.float64)

    def forward(self, x, start=0):
        x, rows, end = self.first(x), len(x), start + x.shape[1]
        if self.kind == "same":
            self.table = self.table.to(x.device)
        if self.kind == "type":
            self.table = self.table.type_as(x)
        if self.kind == "written":
            self.table = self.table.to(x)
            self.table[:rows, start:end] = x
        return self.last(self.mix(x + self.table[:rows, start:end]).relu())


@pytest.mark.parametrize("kind", ["same", "type", "written"])
def test_a_table_that_a_forward_moves_stays_whole_at_narrow_widths(kind):
    x, later = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    model = made(Positions(kind))
    slim = slimmable.slimify(copy.deepcopy(model), (1.0, 0.5), example_inputs=x)
    plain = {0.5: slimmable.extract(slim, 0.5), 1.0: model}
    with torch.no_grad():
        for width in (0.5, 1.0, 0.5):
            slimmable.set_width(slim, width)
            for given, start in ((x, 0), (later, 5)):
                assert torch.equal(slim(given, start), plain[width](given, start))
    slimmable.set_width(slim, 1.0)
    assert slim.table.shape == (4, 9, 32)
    if kind != "written":
        assert torch.equal(slim.table, model.table)


class Multimodal(nn.Module):
    """Puts what it makes of patches in the places of some words, as language models that see images do."""

    def __init__(self, put):
        super().__init__()
        self.words, self.image, self.head = nn.Embedding(50, 32), nn.Linear(48, 32), nn.Linear(32, 6)
        self.put = put
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, words, patches):
        x = self.words(words)
        x = self.put(x, (words == 7).unsqueeze(-1), self.image(patches))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


PUT = {
    "of one column": lambda x, mask, image: x.masked_scatter(mask, image),
    "expanded": lambda x, mask, image: x.masked_scatter(mask.expand_as(x), image),
    "flattened": lambda x, mask, image: x.masked_scatter(mask, image.flatten()),  # stays full
    "by name": lambda x, mask, image: x.masked_scatter(mask=mask, source=image),
}


@pytest.mark.parametrize("kind", PUT)
def test_features_of_an_image_may_take_the_places_of_words(kind):
    words = torch.randint(8, 50, (2, 12))
    words[:, 2:6] = 7
    plan = checked(made(Multimodal(PUT[kind])), words, torch.randn(2, 4, 48, dtype=torch.float64))
    assert half(plan) < (0.35 if kind in ("of one column", "expanded") else 0.7)
