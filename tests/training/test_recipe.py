"""The recipe's step equals the summed loss, holds one graph at a time, and puts the width back."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable import losses
from slimmable._width import at_width, set_width, width_of
from slimmable.errors import DataError, UsageError, WidthError
from slimmable.layers import SlimLinear, SwitchableBatchNorm1d
from slimmable.training import SlimRecipe

WIDTHS = (1.0, 0.75, 0.5, 0.25)
KINDS = (None, "kl", "embedding", "mse", "dkd", "atkd")


def network(widths=WIDTHS, hidden=16):
    torch.manual_seed(0)
    return nn.Sequential(
        SlimLinear(6, hidden, widths=widths, slim_in=False),
        SwitchableBatchNorm1d(hidden, widths=widths),
        nn.ReLU(),
        SlimLinear(hidden, 8, widths=widths, slim_out=False),
    ).double()


def views(batch=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 6, generator=generator, dtype=torch.float64)


def run_step(recipe, x0, x1, progress=1.0):
    """One step as a user writes it; returns the widths that ran and their losses."""
    ran = {}
    for width in recipe.widths(progress):
        z0, z1 = recipe.model(x0), recipe.model(x1)
        loss = recipe.loss(losses.nt_xent(z0, z1), teach=losses.nt_xent_logits(z0, z1))
        loss.backward()
        ran[width] = loss.item()
    return ran


def summed_loss(model, distill, weights, x0, x1):
    """The same step with all widths' graphs alive and one backward."""
    contrastive, logits = [], []
    for width in WIDTHS:
        set_width(model, width)
        z0, z1 = model(x0), model(x1)
        contrastive.append(losses.nt_xent(z0, z1))
        logits.append(losses.nt_xent_logits(z0, z1))
    set_width(model, 1.0)
    taught = [] if distill is None else [distill(logits[i], logits[:i]) for i in range(1, len(WIDTHS))]
    share = 0.0 if distill is None else distill.weight
    return losses.slim_loss(contrastive, taught, weights, share)


def assert_same_gradients(model, reference):
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(("widest", "all wider")),
    st.lists(st.floats(0, 3), min_size=4, max_size=4),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_gradients_equal_those_of_the_summed_loss(kind, teachers, weights, share, seed):
    distill = kind and losses.OnlineDistillation(kind, teachers=teachers, weight=share)
    model = network()
    reference = copy.deepcopy(model)
    x0, x1 = views(seed=seed)
    ran = run_step(SlimRecipe(model, distill, weights), x0, x1)
    total = summed_loss(reference, distill, weights, x0, x1)
    total.backward()
    assert list(ran) == list(WIDTHS)
    assert sum(ran.values()) == pytest.approx(total.item(), rel=1e-10)
    assert_same_gradients(model, reference)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_weights_by_mode_sequence_and_mapping():
    model = network()
    expected = dict(zip(WIDTHS, (2.5, 1.0, 1.0, 1.0), strict=True))
    assert SlimRecipe(model).loss_weights == expected
    assert SlimRecipe(model, loss_weights=(2.5, 1, 1, 1)).loss_weights == expected
    mapping = SlimRecipe(model, loss_weights={0.25: 1, 0.5: 1, 0.75: 1, 1: 2.5}).loss_weights
    assert list(mapping.items()) == list(expected.items())


def test_the_repr_shows_the_widths_and_the_techniques():
    recipe = SlimRecipe(network((1.0, 0.5)), losses.OnlineDistillation("mse"), slow_start=0.25)
    assert repr(recipe) == (
        f"SlimRecipe(widths=(1.0, 0.5), distill={recipe.distill!r}, loss_weights=(1.5, 1.0), slow_start=0.25, "
        "random_widths=0)"
    )
    drawn = SlimRecipe(universal((1.0, 0.25)), loss_weights="ones", random_widths=2)
    assert "widths=(1.0, 0.25), distill=None, loss_weights='ones'" in repr(drawn)
    assert "random_widths=2" in repr(drawn)


def test_slow_start_trains_the_widest_width_only_and_unweighted():
    model = network()
    recipe = SlimRecipe(model, losses.OnlineDistillation(), slow_start=0.5)
    x0, x1 = views()
    before = copy.deepcopy(model.state_dict())
    ran = run_step(recipe, x0, x1, progress=0.499)
    assert ran == {1.0: pytest.approx(losses.nt_xent(model(x0), model(x1)).item())}
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(p.grad is None for name, p in model.named_parameters() if "narrow" in name)
    assert list(run_step(recipe, x0, x1, progress=0.5)) == list(WIDTHS)


def test_slow_start_needs_no_teacher():
    recipe = SlimRecipe(network(), losses.OnlineDistillation(), slow_start=0.5)
    for _ in recipe.widths(0.0):
        assert recipe.loss(torch.tensor(3.0)) == 3


def test_first_and_the_active_width():
    model = network()
    recipe = SlimRecipe(model)
    assert not recipe.first
    seen = [(width, width_of(model), recipe.first) for width in recipe.widths(1.0)]
    assert seen == [(1.0, 1.0, True), (0.75, 0.75, False), (0.5, 0.5, False), (0.25, 0.25, False)]
    assert not recipe.first


def test_the_width_is_put_back_after_the_loop_a_break_and_an_exception():
    model = network()
    recipe = SlimRecipe(model)
    for _ in recipe.widths(1.0):
        pass
    assert width_of(model) == 1.0
    for width in recipe.widths(1.0):
        if width == 0.5:
            break
    assert width_of(model) == 1.0

    def fail():
        for width in recipe.widths(1.0):
            if width == 0.25:
                raise KeyError(width)

    with pytest.raises(KeyError):
        fail()
    assert width_of(model) == 1.0
    with pytest.raises(UsageError, match="no loop is running"):
        recipe.loss(torch.tensor(1.0))


def test_a_loop_that_is_left_but_kept_does_not_disturb_the_next():
    model = network()
    recipe = SlimRecipe(model)
    left = recipe.widths(1.0)
    assert [next(left), next(left)] == [1.0, 0.75]
    widths = []
    for width in recipe.widths(1.0):
        assert list(left) == []
        assert width_of(model) == width
        recipe.loss(torch.tensor(1.0))
        widths.append(width)
    assert widths == list(WIDTHS)


def test_several_tensors_teach_each_with_its_own_and_add_up():
    distill = losses.OnlineDistillation("kl", 1.0, 1.0, "all wider", 0.3)
    model = network()
    recipe = SlimRecipe(model, distill, "ones")
    a, b = torch.randn(2, len(WIDTHS), 3, 5, generator=torch.Generator().manual_seed(0))
    for i, _ in enumerate(recipe.widths(1.0)):
        loss = recipe.loss(torch.tensor(2.0), teach=(a[i], b[i]))
        expected = 2.0 if i == 0 else 0.7 * 2 + 0.3 * (distill(a[i], list(a[:i])) + distill(b[i], list(b[:i])))
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_two_models_switch_together_in_a_module_list():
    encoder, predictor = network(), network()
    recipe = SlimRecipe(nn.ModuleList([encoder, predictor]))
    assert [(width_of(encoder), width_of(predictor)) for _ in recipe.widths(1.0)] == [(w, w) for w in WIDTHS]


def test_a_model_of_one_width():
    model = network(widths=(1.0,))
    recipe = SlimRecipe(model, losses.OnlineDistillation())
    assert run_step(recipe, *views()) == {1.0: pytest.approx(losses.nt_xent(*map(model, views())).item())}


def test_copies_and_pickles_also_within_a_loop():
    recipe = SlimRecipe(network(), losses.OnlineDistillation("mse"), "share", slow_start=0.25)
    for _ in recipe.widths(1.0):
        for twin in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
            assert not twin.first
            set_width(twin.model, 1.0)
            assert run_step(twin, *views()) == run_step(SlimRecipe(network(), recipe.distill, "share"), *views())
            assert twin.slow_start == 0.25


class SavedBytes:
    """Counts the bytes that autograd holds for backward, and the most at one time."""

    def __init__(self):
        self.alive = self.peak = 0

    def pack(self, tensor):
        return Held(self, tensor)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Held:
    def __init__(self, meter, tensor):
        self.meter, self.tensor, self.size = meter, tensor.detach(), tensor.numel() * tensor.element_size()
        meter.alive += self.size
        meter.peak = max(meter.peak, meter.alive)

    def __del__(self):
        self.meter.alive -= self.size


@pytest.mark.parametrize("teachers", ["widest", "all wider"])
def test_saved_activations_are_those_of_the_widest_width(teachers):
    x0, x1 = views(batch=8)
    distill = losses.OnlineDistillation(teachers=teachers)
    with SavedBytes() as widest:
        run_step(SlimRecipe(network(hidden=256), distill, slow_start=0.5), x0, x1, progress=0.0)
    with SavedBytes() as step:
        run_step(SlimRecipe(network(hidden=256), distill), x0, x1)
    with SavedBytes() as together:
        summed_loss(network(hidden=256), distill, [1] * 4, x0, x1).backward()
    assert step.peak == widest.peak
    assert together.peak > 2 * widest.peak
    assert step.alive == widest.alive == together.alive == 0


def in_loop(call, **arguments):
    recipe = SlimRecipe(network(), **arguments)
    for width in recipe.widths(1.0):
        call(recipe, width)


C, T = torch.tensor(1.0), torch.zeros(3, 4)
KL = losses.OnlineDistillation()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SlimRecipe(network(), slow_start=1.5), UsageError, [r"slow_start .* in \[0, 1\], got 1.5"]),
        (lambda: SlimRecipe(network(), slow_start=math.nan), UsageError, ["slow_start", "nan"]),
        (lambda: SlimRecipe(network()).widths(-0.1), UsageError, [r"progress .* in \[0, 1\], got -0.1"]),
        (lambda: SlimRecipe(network()).widths(1.01), UsageError, ["progress", "1.01"]),
        (lambda: SlimRecipe(network()).widths(math.nan), UsageError, ["progress", "nan"]),
        (lambda: SlimRecipe(network()).widths(True), UsageError, ["progress", "True"]),
        (lambda: SlimRecipe(network()).widths("0.5"), UsageError, ["progress", "'0.5'"]),
        (lambda: SlimRecipe(network(), loss_weights="rest"), UsageError, ["unknown mode 'rest'"]),
        (
            lambda: SlimRecipe(network(), loss_weights=(1, 1)),
            WidthError,
            [r"loss_weights \(1, 1\) do not match the widths"],
        ),
        (lambda: SlimRecipe(network(), loss_weights={1.0: 1, 0.5: 1}), WidthError, [r"\[0.5, 1.0\], the model has"]),
        (lambda: SlimRecipe(network(), loss_weights=(1, 1, 1, -1)), WidthError, ["width 0.25", "got -1"]),
        (lambda: SlimRecipe(network(), loss_weights=(1, math.nan, 1, 1)), WidthError, ["width 0.75", "got nan"]),
        (lambda: SlimRecipe(network()).loss(C), UsageError, ["no loop is running"]),
        (lambda: in_loop(lambda r, w: (r.loss(C), r.loss(C))), UsageError, ["at width 1.0: called twice"]),
        (lambda: in_loop(lambda r, w: r.loss(C), distill=KL), UsageError, ["at width 1.0: teach is missing"]),
        (
            lambda: in_loop(lambda r, w: r.loss(C, T if r.first else None), distill=KL),
            UsageError,
            ["at width 0.75: teach is missing"],
        ),
        (
            lambda: in_loop(lambda r, w: r.first or r.loss(C, T), distill=KL),
            UsageError,
            ["width 0.75: there is no teacher", "widest width too"],
        ),
        (
            lambda: in_loop(lambda r, w: r.loss(C, T if r.first else (T, T)), distill=KL),
            UsageError,
            ["width 0.75: teach has 2 tensors, expected 1"],
        ),
        (
            lambda: in_loop(lambda r, w: r.loss(1.0)),
            DataError,
            ["at width 1.0: loss must be a scalar tensor .* got 1.0"],
        ),
        (lambda: in_loop(lambda r, w: r.loss(T)), DataError, [r"scalar tensor .* got a tensor of shape \(3, 4\)"]),
        (lambda: in_loop(lambda r, w: r.loss(C, 5), distill=KL), DataError, [r"teach\[0\] must be a tensor .* got 5"]),
        (lambda: in_loop(lambda r, w: r.loss(C, [T, "b"]), distill=KL), DataError, [r"teach\[1\] must be", "'b'"]),
        (lambda: SlimRecipe(network(), lambda a, b: C), UsageError, ["distill must be an OnlineDistillation or None"]),
        (lambda: in_loop(lambda r, w: r.loss(C, ()), distill=KL), UsageError, ["teach has 0 tensors", "expected 1"]),
    ],
)
def test_errors_say_what_does_not_fit(call, error, words):
    for word in words:
        with pytest.raises(error, match=word):
            call()


def test_bad_progress_is_found_before_the_loop_and_changes_nothing():
    model = network()
    recipe = SlimRecipe(model)
    set_width(model, 0.5)
    with pytest.raises(UsageError):
        recipe.widths(2.0)
    assert width_of(model) == 0.5


def universal(widths=(1.0, 0.5, 0.25), universal=True):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).double()
    return slimmable.slimify(plain, widths, example_inputs=views()[0], universal=universal)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from(["ones", "widest_plus_rest"]))
def test_the_sandwich_rule_sums_the_losses_of_both_ends_and_of_drawn_widths(count, seed, mode):
    x0, x1 = views()
    model = universal()
    distill = losses.OnlineDistillation(teachers="all wider")
    recipe = SlimRecipe(model, distill, mode, random_widths=count, seed=seed)
    ran = run_step(recipe, x0, x1)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    assert list(ran) == sorted(ran, reverse=True)
    assert (max(ran), min(ran), len(ran)) == (1.0, 0.25, count + 2)
    assert width_of(model) == 1.0

    twin, outputs = universal(), {}
    for width in ran:
        with at_width(twin, width):
            outputs[width] = twin(x0), twin(x1)
    weights = dict(zip(ran, losses.width_weights(list(ran), mode), strict=True))
    total = 0
    for width, (z0, z1) in outputs.items():
        wider = [losses.nt_xent_logits(*outputs[other]).detach() for other in outputs if other > width]
        taught = None if width == 1 else distill(losses.nt_xent_logits(z0, z1), wider)
        total += losses.slim_term(losses.nt_xent(z0, z1), taught, weights[width], distill.weight)
    total.backward()
    for ours, parameter in zip(gradients, twin.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-10, atol=1e-12)


def test_draws_are_anew_in_each_step_and_the_same_for_the_same_seed():
    first, second = [[*SlimRecipe(universal(), random_widths=2, seed=s).widths(1.0)] for s in (3, 3)]
    assert first == second
    recipe = SlimRecipe(universal(), random_widths=2, seed=3)
    steps = [[*recipe.widths(1.0)] for _ in range(3)]
    assert steps[0] == first
    assert steps[0] != steps[1] != steps[2]
    by_step = {s: [*SlimRecipe(universal(), random_widths=2, seed=s).widths(1.0, step=5)] for s in (3, 4)}
    assert by_step[3] == [*recipe.widths(1.0, step=5)] != by_step[4]
    assert [*SlimRecipe(universal(), slow_start=0.5, random_widths=2).widths(0.1)] == [1.0]


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (network, {"random_widths": 2}, "universal=True"),
        (lambda: universal((1.0, 0.75, 0.5), universal=False), {"random_widths": 2}, "universal=True"),
        (lambda: universal((1.0,)), {"random_widths": 2}, "a width below 1.0"),
        (universal, {"random_widths": -1}, "-1"),
        (universal, {"random_widths": 2, "loss_weights": [1, 1, 1]}, "mode"),
    ],
)
def test_sandwich_arguments_that_do_not_fit(model, options, says):
    with pytest.raises((UsageError, WidthError), match=says):
        SlimRecipe(model(), **options)


def test_a_width_reads_each_block_once_within_its_part_of_the_step():
    """Two views then share the block, whose gradient is padded with zeros once; all else reads anew."""
    model = network()
    recipe, layer = SlimRecipe(model), model[3]
    for width in recipe.widths(1.0):
        recipe.loss(torch.tensor(1.0))
        if width < 1:
            with torch.no_grad():
                unlearnable = layer.weight
            block = layer.weight
            assert block is not unlearnable
            assert layer.weight is block
            assert layer.bias is layer._parameters["bias"]
            with torch.no_grad():
                assert layer.weight is not block
            with at_width(model, 0.25 if width == 0.5 else 0.5):
                assert layer.weight.shape != block.shape
        narrow = layer.weight
    assert layer.weight is not narrow
    with at_width(model, 0.5):
        assert layer.weight is not layer.weight


@pytest.mark.parametrize("change", ["data", "in place", "another parameter", "frozen"])
def test_a_parameter_that_changes_within_a_width_is_read_as_it_is(change):
    """As when the optimizer steps once per width, with several backward passes for each."""
    torch.manual_seed(0)
    model, x = network(), torch.randn(5, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    recipe, new = SlimRecipe(model, loss_weights="ones"), torch.randn(8, 16, dtype=torch.float64)

    def alter(net):
        weight = net[3]._parameters["weight"]
        if change == "data":
            weight.data = new.clone()
        elif change == "in place":
            with torch.no_grad():
                weight.copy_(new)
        elif change == "frozen":
            weight.requires_grad_(False)
        else:
            net[3].weight = nn.Parameter(new.clone())

    for width in recipe.widths(1.0):
        recipe.loss(torch.tensor(1.0))
        model(x).square().mean().backward()
        alter(model)
        model(x).square().mean().backward()
        model(x).mean().backward()
        with at_width(other, width):
            other(x).square().mean().backward()
            alter(other)
            (other(x).square().mean() + other(x).mean()).backward()
    for (name, parameter), plain in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, plain.grad, rtol=1e-10, atol=1e-12, msg=name)
