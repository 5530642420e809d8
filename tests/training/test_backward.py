"""A step by `recipe.backward` equals the loop over widths, written out; what a step may change, it changes once."""

import array
import collections
import copy
import dataclasses
import pickle
import random

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import slimmable
from slimmable import losses
from slimmable._width import width_of
from slimmable.errors import DataError, UsageError
from slimmable.training import MomentumEncoder, SlimRecipe
from tests.training.test_recipe import KINDS, WIDTHS, SavedBytes, network, universal, views

KL = losses.OnlineDistillation


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def looped(recipe, closure, progress=1.0):
    """The step with a loop over the widths; the closure returns the loss and what is taught."""
    own = {}
    for width in recipe.widths(progress):
        loss, teach = closure()
        recipe.loss(loss, teach if recipe.distill else None).backward()
        own[width] = loss.detach()
    return own


def assert_equal_steps(ours, closure, reference, reference_closure, **modules):
    """Both models take the step, by `backward` and by the loop."""
    loss = ours.backward(closure, **modules)
    own = looped(reference, reference_closure)
    assert loss == own[1.0]
    assert ours.losses == own
    torch.testing.assert_close(gradients(ours.model), gradients(reference.model), rtol=0, atol=0)
    torch.testing.assert_close(ours.model.state_dict(), reference.model.state_dict(), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(("widest", "all wider")), st.integers(0, 1000))
def test_a_step_equals_the_loop_over_widths(kind, teachers, seed):
    distill = kind and KL(kind, teachers=teachers)
    ours, reference = (SlimRecipe(network(), distill) for _ in range(2))
    x0, x1 = views(seed=seed)

    def by_hand():
        z0, z1 = reference.model(x0), reference.model(x1)
        return losses.nt_xent(z0, z1), (z0, z1) if kind in ("embedding", "mse") else losses.nt_xent_logits(z0, z1)

    assert_equal_steps(ours, lambda: losses.nt_xent(ours.model(x0), ours.model(x1)), reference, by_hand)


def test_the_saved_activations_are_those_of_the_widest_width_and_of_total_those_of_all():
    x0, x1 = views(batch=8)

    def peak(way, **options):
        model = network(hidden=256)
        recipe = SlimRecipe(model, KL(), steps=1, **options)
        with SavedBytes() as saved:
            result = getattr(recipe, way)(lambda: losses.nt_xent(model(x0), model(x1)))
            if way == "total":
                result.backward()
        assert saved.alive == 0
        return saved.peak

    assert peak("backward") == peak("backward", slow_start=0.5)
    assert peak("total") > 2 * peak("backward")


def test_total_has_the_gradients_of_backward_and_its_value_counts_divergences():
    x0, x1 = views()
    one, other = network(), network()
    recipe, twin = SlimRecipe(one, KL()), SlimRecipe(other, KL())
    recipe.backward(lambda: losses.nt_xent(one(x0), one(x1)))
    total = twin.total(lambda: losses.nt_xent(other(x0), other(x1)))
    total.backward()
    torch.testing.assert_close(gradients(one), gradients(other), rtol=1e-10, atol=1e-12)
    assert (recipe.losses, recipe.distillations) == (twin.losses, twin.distillations)
    expected = 2.5 * twin.losses[1.0]
    expected += sum((twin.losses[width] + twin.distillations[width]) / 2 for width in WIDTHS[1:])
    torch.testing.assert_close(total.detach(), expected)
    assert twin.steps_done == 1


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("temperatures", [(5.0, 5.0), (1.0, 4.0)])
@pytest.mark.parametrize("teachers", ["widest", "all wider"])
def test_the_distillation_that_is_logged_is_zero_where_student_and_teacher_agree(kind, temperatures, teachers):
    model = nn.Sequential(nn.Linear(6, 8)).double()  # nothing gets thinner
    model = slimmable.slimify(model, WIDTHS, example_inputs=views()[0])
    of_teacher, of_student = temperatures if kind == "kl" else (5.0, 5.0)
    distill = KL(kind, of_teacher, of_student, teachers=teachers)
    recipe = SlimRecipe(model, distill)
    agreeing = of_student / of_teacher

    def closure():
        scores = model(views()[0])
        return scores.square().mean(), scores if recipe.first else agreeing * scores

    if teachers == "all wider" and agreeing != 1:
        return  # teachers at their own temperature and a student at its own cannot all agree
    recipe.backward(closure)
    for divergence in recipe.distillations.values():
        assert divergence.item() == pytest.approx(0, abs=1e-12)


def test_the_logged_distillation_is_the_divergence():
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64)
    found = KL("kl", 2.0, 3.0)(student, teacher) - KL("kl", 2.0, 3.0).floor(teacher)
    log_p, log_q = (teacher / 2).log_softmax(1), (student / 3).log_softmax(1)
    torch.testing.assert_close(found, 9 * (log_p.exp() * (log_p - log_q)).sum(1).mean())


class Counting(nn.Module):
    """A teacher that counts its calls and has a BatchNorm, whose statistics each of them changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double().requires_grad_(False)
        self.calls = 0

    def encode(self, x):
        self.calls += 1
        return self.body(x)

    def forward(self, x):
        return {"embedding": self.encode(x)}


@pytest.mark.parametrize("method", [False, True], ids=["forward", "other method"])
def test_frozen_modules_run_at_the_widest_width_only(method):
    x0, x1 = views()
    model, teacher = network(), Counting()
    reference, its_teacher = copy.deepcopy(model), copy.deepcopy(teacher)

    def distance(model, teacher, x, other):
        target = teacher.encode(other) if method else teacher(other)["embedding"]
        return (model(x) - target.mul_(2)).square().mean()  # in place, as normalisations are

    ours, by_hand, targets = SlimRecipe(model, frozen=[teacher]), SlimRecipe(reference), []
    ours.backward(lambda: distance(model, teacher, x0, x1) + distance(model, teacher, x1, x0))
    for _ in by_hand.widths(1.0):
        if by_hand.first:
            targets = [2 * its_teacher(x)["embedding"] for x in (x1, x0)]
        terms = [(reference(x) - target).square().mean() for x, target in zip((x0, x1), targets, strict=True)]
        by_hand.loss(sum(terms)).backward()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)
    torch.testing.assert_close(teacher.state_dict(), its_teacher.state_dict(), rtol=0, atol=0)
    assert teacher.calls == 2
    assert "forward" not in vars(teacher) | vars(teacher.body)
    teacher(x0)
    assert teacher.calls == 3


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_and_teachers_compile_once(in_place):
    model, teacher, graphs = network((1.0, 0.5)), Counting().body, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    reference, its_teacher = copy.deepcopy(model), copy.deepcopy(teacher)
    if in_place:
        model.compile(backend=backend)
        teacher.compile(backend=backend)
        fast, fast_teacher = model, teacher
    else:
        fast, fast_teacher = torch.compile(model, backend=backend), torch.compile(teacher, backend=backend)
    ours, by_hand = SlimRecipe(fast, KL(), frozen=[fast_teacher]), SlimRecipe(reference, KL(), frozen=[its_teacher])
    counts = []
    for seed in range(10):
        x0, x1 = views(seed=seed)
        loss = ours.backward(lambda x0=x0, x1=x1: (fast(x0) - fast_teacher(x1)).square().mean())
        assert loss == by_hand.backward(lambda x0=x0, x1=x1: (reference(x0) - its_teacher(x1)).square().mean())
        counts.append(len(graphs))
    assert counts[0] == counts[-1]
    assert in_place or counts[0] == 3  # two widths, and the teacher; up to torch 2.11, more in place
    torch.testing.assert_close(gradients(model), gradients(reference))
    torch.testing.assert_close(teacher.state_dict(), its_teacher.state_dict())


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "by .data"])
def test_a_momentum_encoder_that_moves_inside_the_closure_moves_once(assign):
    x0, x1 = views()
    model = network()
    slow = MomentumEncoder(model)
    with torch.no_grad():
        for parameter in slow.parameters():
            parameter.mul_(0.9)
    before = copy.deepcopy(slow)

    def closure():
        for mine, other in zip(slow.parameters(), model.parameters(), strict=True):
            if assign:
                mine.data = mine.data * 0.75 + other.data * 0.25
            else:
                mine.data.mul_(0.75).add_(other.data, alpha=0.25)
        with torch.no_grad():
            target = slow(x1)
        return (model(x0) - target).square().mean()

    # the model that switches may hold the momentum encoder, as in programs with one module for all
    SlimRecipe(nn.ModuleList([model, slow]), frozen=[slow]).backward(closure)
    before.update(model, 0.75)
    for mine, other in zip(slow.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-15)
    before(x1)
    torch.testing.assert_close(dict(slow.named_buffers()), dict(before.named_buffers()))


@dataclasses.dataclass
class Meter:
    calls: int = 0


class Criterion(nn.Module):
    """Keeps state of every kind, and changes all of it when it is called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("late", None)
        self.prototypes = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))  # trained, so it is the optimizer's
        self.covariance = None
        self.count, self.history = 0, collections.deque(maxlen=5)
        self.table, self.array, self.seen = {"sums": [torch.zeros(2)]}, np.zeros(2), set()
        self.generator, self.draws = random.Random(3), torch.Generator().manual_seed(3)
        self.tally, self.user = collections.Counter(), collections.UserDict(calls=0)
        self.meter, self.numbers = Meter(), array.array("d")
        self.inner = nn.BatchNorm1d(8).double()

    def forward(self, z):
        z = self.inner(z)
        self.queue = torch.cat([self.queue[1:], z.detach().mean()[None]])
        self.late = z.detach().mean() if self.late is None else self.late + 1
        self.prototypes.data = self.prototypes.data + z.detach().std()
        self.prototypes.data.mul_(0.5)
        self.covariance = z.detach().T @ z.detach() if self.covariance is None else 0.5 * self.covariance
        self.count += 1
        self.history.append(self.count)
        self.table["sums"][0].add_(1)
        self.table[self.count] = self.generator.random()
        self.array += 1
        self.seen.add(self.count)
        self.tally["calls"] += 1
        self.user["calls"] += 1
        self.meter.calls += 1
        self.numbers.append(torch.rand((), generator=self.draws))
        if not hasattr(self, "added"):
            self.added = "at the first call"
        return self.scale * (z.square().mean() + self.queue.sum() + self.covariance.mean() + self.count)


def state_of(criterion):
    names = ["queue", "late", "prototypes", "covariance", "count", "table", "array"]
    state = {name: getattr(criterion, name) for name in names} | {"inner": criterion.inner.state_dict()}
    listed = [*criterion.history, *criterion.seen, hasattr(criterion, "added"), *criterion.generator.getstate()[1]]
    state |= {"tally": dict(criterion.tally), "user": dict(criterion.user), "meter": criterion.meter.calls}
    return state | {"listed": listed, "numbers": list(criterion.numbers), "draws": criterion.draws.get_state()}


@pytest.mark.parametrize("way", ["backward", "total", "loop"])
def test_all_state_of_a_criterion_changes_once_per_step(way):
    """It is the same as after a program without widths, and every width meets it as the widest did."""
    model, criterion = network(), Criterion()
    plain, its_criterion = copy.deepcopy(model), copy.deepcopy(criterion)
    recipe = SlimRecipe(model, once=[criterion])
    counts, kinds = [], set()
    criterion.register_forward_hook(lambda module, args, output: counts.append(module.count))
    criterion.register_forward_hook(lambda module, args, output: kinds.add(type(module.prototypes)))
    for seed in range(3):
        x = views(seed=seed)[0]
        if way == "loop":
            for _ in recipe.widths(1.0):
                with recipe.once(criterion):
                    loss = criterion(model(x))
                recipe.loss(loss).backward()
        elif way == "total":
            recipe.total(lambda x=x: criterion(model(x))).backward()
        else:
            recipe.backward(lambda x=x: criterion(model(x)))
        expected = its_criterion(plain(x))
        assert recipe.losses[1.0] == expected
        torch.testing.assert_close(state_of(criterion), state_of(its_criterion), rtol=0, atol=0)
    assert counts == [1] * 4 + [2] * 4 + [3] * 4
    assert kinds == {nn.Parameter}


def test_what_a_step_notes_in_a_converted_model_changes_once_if_asked():
    class Noting(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
            self.steps, self.seen, self.queue = 0, [], torch.zeros(3)

        def training_step(self, x):  # as of a LightningModule that is converted as a whole
            self.steps += 1
            self.seen.append(self.steps)
            self.queue = torch.cat([self.queue[1:], torch.full((1,), self.steps)])
            return self(x).square().mean()

    x = torch.ones(2, 6)
    model = slimmable.slimify(Noting(), WIDTHS, example_inputs=x)
    recipe = SlimRecipe(model, once=[model])
    for _ in range(3):
        recipe.backward(lambda: model.training_step(x))
    assert (model.steps, model.seen, model.queue.tolist()) == (3, [1, 2, 3], [1, 2, 3])


def test_parameters_in_a_list_of_a_criterion_learn_at_every_width():
    model = slimmable.SlimLinear(6, 8, widths=WIDTHS, slim_in=False, slim_out=False)
    criterion = nn.Module()
    criterion.held, criterion.gain = [nn.Parameter(torch.ones(8))], nn.Parameter(torch.ones(8))
    recipe = SlimRecipe(model, once=[criterion])
    recipe.backward(lambda: (model(torch.ones(2, 6)) * criterion.held[0] * criterion.gain).square().mean())
    assert torch.equal(criterion.held[0].grad, criterion.gain.grad)


class WithQueue(nn.Module):
    """A model that holds a queue of its own outputs, as published MoCo programs do, and returns the loss."""

    def __init__(self):
        super().__init__()
        self.encoder = network()
        self.register_buffer("queue", torch.zeros(15, 8, dtype=torch.float64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        z = self.encoder(x)
        loss = (z @ self.queue.clone().T).square().mean() + z.square().mean()
        self.queue[int(self.pointer) : int(self.pointer) + len(z)] = z.detach()
        self.pointer[...] = (self.pointer + len(z)) % 15
        return loss


def test_a_queue_inside_the_model_changes_once_without_being_asked():
    model = WithQueue()
    plain = copy.deepcopy(model)
    recipe = SlimRecipe(model)
    for seed in range(4):
        x = views(seed=seed)[0]
        assert recipe.backward(lambda x=x: model(x)) == plain(x)
        assert model.pointer == plain.pointer
        torch.testing.assert_close(model.queue, plain.queue, rtol=0, atol=0)
    statistics = [norm.num_batches_tracked for norm in model.modules() if isinstance(norm, nn.BatchNorm1d)]
    assert statistics == [4] * 4  # while those of every width's norm go on


def test_an_error_in_the_closure_leaves_everything_in_order():
    model, criterion, teacher = network(), Criterion(), Counting()
    recipe = SlimRecipe(model, frozen=[teacher], once=[criterion], steps=10)

    def closure():
        target = teacher(views()[0])["embedding"]
        loss = criterion(model(views()[0]) - target)
        if not recipe.first:
            raise KeyError("narrow")
        return loss

    with pytest.raises(KeyError):
        recipe.backward(closure)
    assert (width_of(model), criterion.count, teacher.calls, recipe.steps_done) == (1.0, 1, 1, 0)
    assert "forward" not in vars(teacher)
    assert not model._forward_hooks


def test_it_counts_its_own_progress_and_stays_at_the_end():
    model = network()
    recipe = SlimRecipe(model, steps=4, slow_start=0.5)
    ran = []
    for _ in range(6):
        ran.append((recipe.progress, recipe.backward(lambda: model(views()[0]).square().mean()) is not None))
        ran[-1] = ran[-1][0], len(recipe.losses)
    assert ran == [(0.0, 1), (0.25, 1), (0.5, 4), (0.75, 4), (1.0, 4), (1.0, 4)]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3))
def test_a_resumed_run_goes_on_where_it_was(done, random_widths):
    def run(recipe, steps):
        ran = []
        for _ in range(steps):
            recipe.backward(lambda: recipe.model(views()[0]).square().mean())
            ran.append(dict(recipe.losses))
        return ran

    make = lambda: SlimRecipe(  # noqa: E731
        universal(), loss_weights="ones", random_widths=random_widths, steps=8, slow_start=0.25, seed=5
    )
    whole, first, second = make(), make(), make()
    expected = run(whole, 6)
    run(first, done)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    second.model.load_state_dict(first.model.state_dict())
    assert run(second, 6 - done) == expected[done:]


def test_the_decorator_and_arguments_of_the_class():
    model, seen = network(), []
    recipe = SlimRecipe(model, backward=lambda loss: (seen.append(loss.item()), (3 * loss).backward()))
    reference = SlimRecipe(copy.deepcopy(model))

    @recipe.step
    def training_step(x, *, scale):
        """The docstring stays."""
        return scale * model(x).square().mean()

    loss = training_step(views()[0], scale=2.0)
    assert training_step.__doc__ == "The docstring stays."
    assert loss == reference.backward(lambda: 2 * reference.model(views()[0]).square().mean())
    assert not loss.requires_grad
    assert seen == [pytest.approx(float(recipe.loss_weights[w] * recipe.losses[w])) for w in WIDTHS]
    expected = {name: 3 * grad for name, grad in gradients(reference.model).items()}
    torch.testing.assert_close(gradients(model), expected)


def classifier():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5))
    return slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 3, 8, 8))


class Named(nn.Module):
    """Returns what models of transformers do: a dict with scores, and features of the width's own size."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"hidden": self.net[:3](x), "logits": self.net(x)}


def scores(model, x):
    output = model(x)
    return output["logits"] if isinstance(output, dict) else output


@pytest.mark.parametrize("wrap", [nn.Identity, Named, nn.ModuleList], ids=["scores", "dict", "list"])
def test_without_teach_scores_are_compared_themselves(wrap):
    x, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    model, reference = classifier(), classifier()
    reference.load_state_dict(model.state_dict())
    whole = Named(model) if wrap is Named else model
    ours = SlimRecipe(nn.ModuleList([model[:3], model[3:]]) if wrap is nn.ModuleList else whole, KL())
    called = (lambda x: ours.model[1](ours.model[0](x))) if wrap is nn.ModuleList else whole
    ours.backward(lambda: nn.functional.cross_entropy(scores(called, x), labels))
    looped(SlimRecipe(reference, KL()), lambda: (nn.functional.cross_entropy(s := reference(x), labels), s))
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)


def test_without_teach_maps_of_scores_and_tokens_are_compared_place_by_place():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 1))
    model = slimmable.slimify(net, (1.0, 0.5), example_inputs=torch.zeros(2, 3, 8, 8), outputs="full")
    for as_tokens in (False, True):
        twin = copy.deepcopy(model)
        if as_tokens:
            twin.append(nn.Flatten(2)).append(Swapped())
        reference = copy.deepcopy(model)
        SlimRecipe(twin, KL()).backward(lambda twin=twin: twin(torch.ones(2, 3, 8, 8)).square().mean())

        def by_hand(reference=reference):
            maps = reference(torch.ones(2, 3, 8, 8))
            return maps.square().mean(), maps.permute(0, 2, 3, 1).reshape(-1, 5)

        looped(SlimRecipe(reference, KL()), by_hand)
        torch.testing.assert_close(gradients(twin), gradients(reference))


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class ActorCritic(nn.Module):
    """Returns scores of five actions and a value, as in reinforcement learning; a loop may call other methods."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.actor, self.critic = nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x):
        features = self.body(x)
        return self.actor(features), self.critic(features)


@pytest.mark.parametrize("kind", ["kl", "embedding", "atkd"])
def test_a_single_score_has_no_classes_to_compare(kind):
    x = torch.randn(8, 6)
    model = slimmable.slimify(ActorCritic(), (1.0, 0.5), example_inputs=x)
    reference = copy.deepcopy(model)

    def by_hand():
        scores, value = reference(x)
        return scores.square().mean() + value.square().mean(), scores

    SlimRecipe(model, KL(kind)).backward(lambda: sum(output.square().mean() for output in model(x)))
    looped(SlimRecipe(reference, KL(kind)), by_hand)
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)
    for net in (nn.Linear(6, 1), nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 16, 1), nn.Conv2d(16, 1, 1))):
        alone = slimmable.slimify(nn.Sequential(nn.Linear(6, 6), net), (1.0, 0.5), example_inputs=x)
        with pytest.raises(UsageError, match="a single score has no classes, so use kind 'mse'"):
            SlimRecipe(alone, KL(kind)).backward(lambda alone=alone: alone(x).square().mean())
        recipe = SlimRecipe(alone, KL("mse"))
        recipe.backward(lambda alone=alone: alone(x).square().mean())
        assert recipe.distillations[0.5] > 0


class ReturnsItsLoss(nn.Module):
    """As published programs do; `teacher` is called last, but cannot learn."""

    def __init__(self, encoder, teacher):
        super().__init__()
        self.encoder, self.teacher = encoder, teacher

    def forward(self, x0, x1):
        z0, z1 = self.encoder(x0), self.encoder(x1)
        return losses.nt_xent(z0, z1) + 0 * self.teacher(x0)["embedding"].mean()


@pytest.mark.parametrize("given", ["model", "parts", "wrapped"])
def test_of_a_model_that_returns_its_loss_the_last_module_in_it_teaches(given):
    x0, x1 = views()
    ours, reference = ReturnsItsLoss(network(), Counting()), network()
    parts = nn.ModuleList([ours.encoder, nn.ModuleDict({"teacher": ours.teacher})])
    called = nn.DataParallel(ours) if given == "wrapped" else ours
    SlimRecipe(parts if given == "parts" else called, KL()).backward(lambda: called(x0, x1))
    SlimRecipe(reference, KL()).backward(lambda: losses.nt_xent(reference(x0), reference(x1)))
    torch.testing.assert_close(gradients(ours.encoder), gradients(reference), rtol=0, atol=0)


class OnTwoDevices(nn.DataParallel):
    """Runs copies of its module, as on two devices."""

    def __init__(self, module):
        super().__init__(module)
        self.device_ids = [0, 1]

    def forward(self, x):
        copies = [self.module, copy.copy(self.module)]
        copies[1]._parameters = {name: torch.zeros_like(own) for name, own in self.module._parameters.items()}
        return torch.cat([each(part) for each, part in zip(copies, x.chunk(2), strict=True)])


def test_copies_on_other_devices_run_by_themselves():
    layer, x = slimmable.SlimLinear(6, 16, widths=(1.0, 0.5), slim_in=False, slim_out=False), torch.randn(8, 6)
    model, seen = OnTwoDevices(layer), []

    def closure():
        seen.append(model(x))
        return seen[-1].square().mean()

    SlimRecipe(model, KL()).backward(closure)
    assert all(not scores[4:].any() and scores[:4].any() for scores in seen)


def test_the_recipes_model_may_be_wrapped_later():
    model = network()
    recipe = SlimRecipe(model, KL("embedding"))
    recipe.backward(lambda: model(X).square().mean())
    recipe.model = nn.Sequential(model)
    recipe.backward(lambda: recipe.model(X).square().mean())
    assert list(recipe.distillations) == list(WIDTHS[1:])


def test_the_closures_own_teach_comes_first():
    model, taught = network(), []

    class Watched(losses.OnlineDistillation):
        def forward(self, student, teachers, target=0):
            taught.append(student.shape)
            return super().forward(student, teachers, target)

    def closure():
        z = model(views()[0])
        return z.square().mean(), (z[:, :3], z[:2])

    SlimRecipe(model, Watched()).backward(closure)
    assert taught == [(5, 3), (2, 8)] * 3


def test_pickles_and_copies_after_a_step():
    recipe = SlimRecipe(network(), KL(), steps=3, once=[Criterion()])
    recipe.backward(lambda: recipe.model(views()[0]).square().mean())
    for twin in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert (twin.steps_done, twin.losses) == (1, recipe.losses)
        twin.backward(lambda twin=twin: twin.model(views()[0]).square().mean())


@pytest.mark.parametrize("inplace", [False, True])
def test_an_optimizer_from_before_the_conversion_is_noticed(inplace):
    net = timm.create_model("test_resnet", num_classes=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = slimmable.slimify(net, (1.0, 0.5), inplace=inplace)
    recipe = SlimRecipe(model)
    step = lambda: recipe.backward(lambda: model(torch.rand(2, 3, 32, 32)).square().mean())  # noqa: E731
    step()
    if not inplace:
        optimizer.step()
        with pytest.raises(UsageError, match=r"SGD trains nothing of this model; make it after slimmable\.slimify"):
            step()
        return
    optimizer.step()
    with pytest.warns(UserWarning, match=r"no optimizer has the model's .*narrow\.0.* after slimmable\.slimify"):
        step()


@pytest.mark.parametrize("way", ["backward", "total"])
def test_optimizers_that_step_inside_backward_need_the_total(way):
    model, steps = network(), collections.Counter()
    recipe = SlimRecipe(model)
    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)
        optimizer.register_step_post_hook(lambda *_, name=name: steps.update([name]))
        parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: own.step())
    closure = lambda: model(views()[0]).square().mean()  # noqa: E731
    if way == "total":
        recipe.total(closure).backward()
        assert set(steps.values()) == {1}
        return
    with pytest.raises(UsageError, match=r"SGD steps inside backward, .* call backward on recipe\.total\(closure\)"):
        recipe.backward(closure)


def test_a_graph_from_before_the_closure_needs_the_total():
    """As of a text tower that runs once for all widths."""
    model, text = network(), nn.Linear(3, 8).double()
    words = text(torch.ones(5, 3, dtype=torch.float64)).tanh()
    closure = lambda: (model(views()[0]) * words).mean()  # noqa: E731
    with pytest.raises(UsageError, match=r"a graph that is freed already; make it in the closure, .*recipe\.total"):
        SlimRecipe(model).backward(closure)
    words = text(torch.ones(5, 3, dtype=torch.float64)).tanh()
    SlimRecipe(model).total(closure).backward()
    assert text.weight.grad.any()


@pytest.mark.filterwarnings("error")
def test_optimizers_that_are_in_order_are_let_be():
    model, head, later = network(), nn.Linear(8, 2).double(), torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    ours = [torch.optim.Adam(list(model.parameters())[:2]), torch.optim.AdamW(list(model.parameters())[2:])]
    other = torch.optim.SGD(head.parameters(), 0.1)
    recipe = SlimRecipe(model)
    for _ in range(3):
        for _ in range(2):  # accumulates
            recipe.backward(lambda: head(model(views()[0])).square().mean())
        for optimizer in (later, other, *ours):  # the first has nothing to do yet
            optimizer.step()
            optimizer.zero_grad()


def step(closure, model=None, **options):
    model = model or network()
    return SlimRecipe(model, **options).backward(lambda: closure(model))


X = views()[0]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: step(lambda m: m(X).mean(), slow_start=0.5), UsageError, "steps=epochs"),
        (lambda: SlimRecipe(network(), steps=0), UsageError, "steps must be a 64-bit integer of at least 1, got 0"),
        (lambda: SlimRecipe(network(), frozen=[3]), UsageError, "frozen must be a list of modules, got 3"),
        (lambda: SlimRecipe(network(), once=[None]), UsageError, "once must be a list of modules, got None"),
        (lambda: step(lambda m: m(X)), DataError, r"scalar tensor .* got a tensor of shape \(5, 8\)"),
        (lambda: step(lambda m: None), DataError, "scalar tensor .* got None"),
        (lambda: step(lambda m: m[0].weight.sum(), distill=KL()), UsageError, "call the recipe's model"),
        (lambda: step(lambda m: m[0](X).mean(), distill=KL()), UsageError, "nothing to compare"),
        (lambda: step(lambda m: m(X).mean(), distill=KL("dkd")), UsageError, r"return \(loss, teach\)"),
        (lambda: SlimRecipe(network()).load_state_dict({"steps_done": -1}), DataError, "steps_done"),
        (lambda: SlimRecipe(network()).load_state_dict({"steps_done": 1, "lr": 2}), DataError, "lr"),
        (lambda: SlimRecipe(network()).load_state_dict(None), DataError, "None"),
    ],
)
def test_errors_say_what_to_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_what_is_frozen_must_not_depend_on_the_width():
    model, head = network(), nn.Linear(8, 2).double().requires_grad_(False)
    with pytest.raises(UsageError, match="frozen Linear returned a tensor with a gradient"):
        SlimRecipe(model, frozen=[head]).backward(lambda: head(model(X)).mean())
    teacher, calls = Counting(), []

    def closure():
        calls.append(None)
        return sum((model(X) - teacher(X)["embedding"]).mean() for _ in calls)

    with pytest.raises(UsageError, match="called more often at a narrower width"):
        SlimRecipe(model, frozen=[teacher]).backward(closure)


def test_what_is_forgotten_in_a_loop_is_noticed():
    model = network()
    with pytest.warns(UserWarning, match=r"width 0\.25 ran without recipe\.loss"):
        list(SlimRecipe(model).widths(1.0))
    with pytest.warns(UserWarning, match="teach is given, but without distill"):
        SlimRecipe(model).backward(lambda: (model(X).mean(), model(X)))
