"""A step of every method is the summed loss of plain forwards; published steps are tested with the recipe."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from slimmable import methods
from slimmable.errors import DataError, DivergedError, UsageError
from slimmable.training import GradientDiagnostics, cosine_momentum
from tests.methods.networks import DIM, FEATURES, HIDDEN, MAKE, WIDTHS, batch_of, encoder, gradients_of, make, recipe_of

EVERY = pytest.mark.parametrize("name", MAKE)


def cosines(a, b):
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def simclr_oracle(method, batch):
    """Every embedding against all others, by a mask."""
    z = torch.cat([method.encoder(view) for view in batch.views])
    logits = (cosines(z, z) / method.temperature).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(16).roll(8))


def mocov3_oracle(method, batch):
    keys = [method.momentum_encoder(view).detach() for view in batch.views]
    queries = [method.online_predictor(method.encoder(view)) for view in batch.views]
    t = method.temperature
    both = zip(queries, keys[::-1], strict=True)
    return 2 * t * sum(F.cross_entropy(cosines(q, k) / t, torch.arange(8)) for q, k in both)


def byol_oracle(method, batch):
    keys = [method.momentum_encoder(view).detach() for view in batch.views]
    found = [method.online_predictor(method.encoder(view)) for view in batch.views]
    both = zip(found, keys[::-1], strict=True)
    return sum((F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean() for p, z in both)


def vicreg_oracle(method, batch):
    first, second = (method.encoder(view) for view in batch.views)
    loss = 25 * (first - second).square().mean()
    for z in (first, second):
        covariance = torch.cov(z.T)
        loss = loss + 25 * F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + (covariance - torch.diag(covariance.diagonal())).square().sum() / DIM
    return loss


def simsiam_oracle(method, batch):
    """Half of what each direction adds, with embeddings that get no gradient as targets (algorithm 1)."""
    first, second = (method.encoder(view) for view in batch.views)
    pairs = ((method.online_predictor(first), second.detach()), (method.online_predictor(second), first.detach()))
    return -sum(F.cosine_similarity(p, z).mean() / 2 for p, z in pairs)


def barlowtwins_oracle(method, batch):
    """The cross-correlation of features that BatchNorm without gain and bias standardises (algorithm 1)."""
    first, second = (method.encoder(view) for view in batch.views)
    first, second = (F.batch_norm(each, None, None, training=True) for each in (first, second))
    difference = (first.T @ second / len(first) - torch.eye(DIM, dtype=first.dtype)).square()
    factors = torch.full((DIM, DIM), 5e-3, dtype=first.dtype).fill_diagonal_(1.0)
    return (difference * factors).sum()


def dino_oracle(method, batch, progress=0.8):
    """Every view of the student with each view of the teacher, but itself (algorithm 1, with multi-crop)."""
    teachers = method.momentum_encoder(torch.cat(batch.views[:2])).detach().chunk(2)
    whole, local = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
    students = [*method.encoder(whole).chunk(2), *method.encoder(local).chunk(len(batch.views) - 2)]
    temperature = 0.04 + min(1.0, progress / method.warm_up) * (method.teacher_temperature - 0.04)
    terms = []
    for i, teacher in enumerate(teachers):
        probabilities = ((teacher - method.center) / temperature).softmax(1)
        for j, student in enumerate(students):
            if i != j:
                terms.append(-(probabilities * (student / method.temperature).log_softmax(1)).sum(1).mean())
    return torch.stack(terms).mean()


def supervised_oracle(method, batch):
    return F.cross_entropy(method.encoder(batch.views[0]), batch.labels)


def frozen(method, batch):
    with torch.no_grad():
        return copy.deepcopy(method.teacher).eval()(batch.views[0])


def scores_oracle(method, batch):
    """Hinton et al. 2015: the divergence from softened probabilities, times the temperature squared."""
    target, student = (frozen(method, batch) / 2).softmax(1), (method.encoder(batch.views[0]) / 2).softmax(1)
    return 2**2 * (target * (target.log() - student.log())).sum(1).mean()


def mse_oracle(method, batch):
    return (method.encoder(batch.views[0]) - frozen(method, batch)).square().mean()


def cosine_oracle(method, batch):
    return (1 - cosines(method.encoder(batch.views[0]), frozen(method, batch)).diagonal()).mean()


ORACLES = {
    "scores": scores_oracle,
    "mse": mse_oracle,
    "cosine": cosine_oracle,
    "simclr": simclr_oracle,
    "mocov3": mocov3_oracle,
    "byol": byol_oracle,
    "vicreg": vicreg_oracle,
    "simsiam": simsiam_oracle,
    "barlowtwins": barlowtwins_oracle,
    "dino": dino_oracle,
    "supervised": supervised_oracle,
}


@pytest.mark.parametrize("name", ORACLES)
def test_the_loss_of_each_width_is_that_of_plain_code(name):
    method, again = make(name), make(name)
    found = method.step(recipe_of(method), batch_of(method), progress=0.8)
    if hasattr(again, "momentum_encoder"):
        with torch.no_grad():
            momentum = cosine_momentum(0.8, again.momentum)
            pairs = zip(again.momentum_encoder.parameters(), again.encoder.parameters(), strict=True)
            for own, other in pairs:
                own.lerp_(other, 1 - momentum)
    for width in WIDTHS:
        with slimmable.at_width(again.online, width):
            expected = ORACLES[name](again, batch_of(again))
        assert found[width] == pytest.approx(expected.item(), rel=1e-9)


@EVERY
def test_the_gradients_are_those_of_one_summed_loss(name):
    method, again = make(name), make(name)
    recipe, other = recipe_of(method), recipe_of(again)
    torch.manual_seed(0)  # of the shuffled keys
    method.step(recipe, batch_of(method), progress=0.8)
    torch.manual_seed(0)
    batch, terms = batch_of(again), []
    for _ in other.widths(0.8):
        if other.first:
            with torch.no_grad():
                batch.targets = again.prepare(batch, 0.8)
        outcome = again(batch)
        own = again.distillation()
        if own is None:  # the recipe has none either
            terms.append(other.loss(outcome.loss))
            continue
        teach = outcome.embeddings if own.kind in ("mse", "embedding") else outcome.logits
        terms.append(other.loss(outcome.loss, teach))
    torch.stack(terms).sum().backward()
    for (label, gradient), expected in zip(gradients_of(method).items(), gradients_of(again).values(), strict=True):
        if expected is None:
            assert gradient is None, label
        else:
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12, msg=label)


@EVERY
def test_slow_start_trains_the_full_width_only(name):
    method = make(name)
    assert list(method.step(recipe_of(method), batch_of(method), progress=0.2)) == [1.0]
    narrow = {label: g for label, g in gradients_of(method).items() if ".narrow." in label}
    assert narrow
    assert all(gradient is None for gradient in narrow.values())


@EVERY
def test_every_trained_parameter_gets_a_gradient(name):
    method = make(name)
    method.step(recipe_of(method), batch_of(method), progress=0.8)
    trained = {id(p) for p in method.online.parameters()}
    for label, parameter in method.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), label
        assert (parameter.grad is not None) == (id(parameter) in trained), label


@EVERY
def test_a_copy_goes_its_own_way(name):
    method = make(name)
    other = copy.deepcopy(method)
    method.step(recipe_of(method), batch_of(method), progress=0.8)
    assert all(gradient is None for gradient in gradients_of(other).values())
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(method.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("name", ["byol", "simsiam", "vicreg", "barlowtwins"])
def test_distillation_of_logits_needs_logits(name):
    method = make(name)
    recipe = slimmable.SlimRecipe(method.online, distill=slimmable.OnlineDistillation("kl"))
    with pytest.raises(UsageError, match=r"has no logits, which distillation of kind 'kl' compares; its own is"):
        method.step(recipe, batch_of(method), progress=0.8)
    assert slimmable.width_of(method.encoder) == 1.0


@pytest.mark.parametrize("kind", ["embedding", "mse", "dkd", "atkd"])
@pytest.mark.parametrize("name", ["simclr", "mocov2", "mocov3", "dino"])
def test_every_kind_of_distillation_runs(name, kind):
    method = make(name)
    recipe = slimmable.SlimRecipe(method.online, distill=slimmable.OnlineDistillation(kind, teachers="all wider"))
    method.step(recipe, batch_of(method), progress=0.8)
    assert all(g.isfinite().all() for g in gradients_of(method).values() if g is not None)


def test_byol_teaches_by_its_own_distance():
    """The distillation of a width is what BYOL's loss would be with the full width's prediction as its target."""
    student, teacher = torch.randn(2, 8, DIM, dtype=torch.float64)
    scaled = [F.normalize(each, dim=1) * DIM**0.5 for each in (student, teacher)]
    torch.testing.assert_close(methods.BYOL.distillation()(*scaled), slimmable.losses.byol_loss(student, teacher))


@pytest.mark.parametrize("name", ["byol", "mocov2", "mocov3"])
def test_embeddings_that_may_have_any_length_are_compared_at_the_length_of_byols_distance(name):
    """Otherwise those of MoCo v2 grow until the comparison by "mse" outweighs the loss."""
    method = make(name)
    batch = batch_of(method)
    with torch.no_grad():
        batch.targets = method.prepare(batch, 0.0)
        outcome = method(batch)
        predictions = [method.encoder(batch.views[0])] if name == "mocov2" else method.predict(batch)
    for embedding, prediction in zip(outcome.embeddings, predictions, strict=True):
        torch.testing.assert_close(embedding, F.normalize(prediction, dim=1) * DIM**0.5, rtol=1e-9, atol=1e-9)


def test_label_smoothing_spreads_a_part_of_the_probability():
    method = make("supervised")
    batch = batch_of(method)
    smooth = methods.Supervised(method.encoder, label_smoothing=0.3)
    with torch.no_grad():
        scores = method.encoder(batch.views[0])
        target = F.one_hot(batch.labels, scores.shape[1]).double() * 0.7 + 0.3 / scores.shape[1]
        expected = -(target * scores.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(smooth(batch).loss, expected, rtol=1e-9, atol=1e-9)
        assert not torch.isclose(method(batch).loss, expected, rtol=1e-3)


def test_the_positive_of_moco_v3_is_that_of_ones_own_process(monkeypatch):
    """The keys of this process come after those of the others before it."""
    method = make("mocov3")
    batch = batch_of(method)
    with torch.no_grad():
        batch.targets = method.prepare(batch, 0.0)
        alone = method(batch)
        others = torch.randn(8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        batch.targets = [torch.cat([others, keys]) for keys in batch.targets]
        monkeypatch.setattr("slimmable.methods.published.rank", lambda: 1)
        second = method(batch)
    for mine, before in zip(second.logits, alone.logits, strict=True):
        assert mine.shape == (8, 16)
        torch.testing.assert_close(mine[:, 0], before[:, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine[:, 9:], before[:, 1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(broken):
    method = make("supervised")
    batch = batch_of(method)
    batch.views[0][0] = broken
    with pytest.raises(DivergedError, match="the loss is nan at width 1"):
        method.step(recipe_of(method), batch, progress=0.8)
    assert all(gradient is None for gradient in gradients_of(method).values())


def test_wrong_batches_are_refused():
    simclr, supervised = make("simclr"), make("supervised")
    with pytest.raises(UsageError, match=r"SimCLR\.step: takes 2 views of each image, got 1"):
        simclr.step(recipe_of(simclr), methods.Batch(batch_of(simclr).views[:1]), 0.8)
    with pytest.raises(DataError, match="Supervised: labels are None, expected class numbers"):
        supervised.step(recipe_of(supervised), methods.Batch(batch_of(supervised).views), 0.8)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "high"])
def test_wrong_settings_are_refused(value):
    network = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="momentum must be a number in"):
        methods.BYOL(network, network, momentum=value)
    if value != 1.5:
        for make_method in (methods.SimCLR, methods.MoCoV2):
            with pytest.raises(UsageError, match="temperature must be a positive number"):
                make_method(network, temperature=value)


def test_mixed_precision_and_diagnostics():
    torch.manual_seed(0)
    method = make("mocov3").float()
    recipe, diagnostics = recipe_of(method), GradientDiagnostics(method.online, every=1)
    batch = methods.Batch([view.float() for view in batch_of(method).views])
    losses = method.step(recipe, batch, 0.8, autocast=torch.bfloat16, diagnostics=diagnostics)
    diagnostics.after_step()
    assert len(losses) == len(WIDTHS)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in method.parameters())
    assert diagnostics.rows[0]["rest_ratio/w0.25"] > 0


def test_steps_in_float16_with_a_scaler_are_those_of_the_plain_loop():
    """At first the scale is so large that gradients overflow: the step is skipped, and nothing has diverged."""
    torch.manual_seed(0)
    ours = make("simclr").float()
    theirs = copy.deepcopy(ours)
    trained = []
    for method in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", 2.0**60, backoff_factor=2.0**-56)
        optimizer = torch.optim.SGD(method.online.parameters(), lr=0.01, momentum=0.9)
        recipe, diagnostics = recipe_of(method), GradientDiagnostics(method.online, every=1)
        weights, infinite = [], []
        for number in range(3):
            batch = methods.Batch([view.float() for view in batch_of(method, number).views])
            optimizer.zero_grad()
            if method is ours:
                scaled = lambda loss, scaler=scaler: scaler.scale(loss).backward()  # noqa: E731
                found = method.step(
                    recipe, batch, 0.8, autocast=torch.float16, backward=scaled, diagnostics=diagnostics
                )
                assert all(math.isfinite(loss) for loss in found.values())
                diagnostics.after_step(scaler.get_scale())
            else:
                for _ in recipe.widths(0.8):
                    with torch.autocast("cpu", torch.float16):
                        outcome = method(batch)
                        loss = recipe.loss(outcome.loss, outcome.logits)
                    scaler.scale(loss).backward()
            infinite.append(not all(p.grad.isfinite().all() for p in method.online.parameters()))
            scaler.step(optimizer)
            scaler.update()
            weights.append([parameter.detach().clone() for parameter in method.parameters()])
        assert infinite == [True, False, False]
        trained.append(weights)
        if method is ours:
            norms = [parameter.grad.norm() for parameter in shared_layers(method)]
            assert diagnostics.rows[-1]["grad_norm/w1.0"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-3)
    for first, second in zip(*trained, strict=True):
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    changed = [not all(map(torch.equal, before, after)) for before, after in itertools.pairwise(trained[0])]
    assert changed == [True, True]
    assert all(map(torch.equal, trained[0][0], make("simclr").float().parameters()))


def shared_layers(method: methods.Method) -> list[torch.Tensor]:
    """The weights that all widths read, with two or more axes."""
    return [parameter for parameter in method.online.parameters() if parameter.ndim > 1]


def test_a_universal_network_draws_the_same_widths_in_the_same_step():
    torch.manual_seed(0)
    network = encoder(methods.SimCLR.projector(FEATURES, HIDDEN, DIM), (1.0, 0.25), universal=True)
    method = methods.SimCLR(network).double()
    drawn = []
    for numbers in ((0, 1, 2), (2,)):
        recipe = slimmable.SlimRecipe(method.online, method.distillation(), "ones", random_widths=2, seed=3)
        drawn.append([tuple(method.step(recipe, batch_of(method), 1.0, step=number)) for number in numbers])
    assert drawn[0][2] == drawn[1][0]
    assert len({*drawn[0]}) == 3


def test_only_the_student_of_dino_sees_local_crops():
    method = make("dino")
    seen = {"student": [], "teacher": []}
    method.encoder.register_forward_pre_hook(lambda _, inputs: seen["student"].append(tuple(inputs[0].shape)))
    hook = lambda _, inputs: seen["teacher"].append(tuple(inputs[0].shape))  # noqa: E731
    method.momentum_encoder.network.register_forward_pre_hook(hook)
    method.step(recipe_of(method), batch_of(method), progress=0.2)
    assert seen == {"student": [(16, 3, 32, 32), (24, 3, 16, 16)], "teacher": [(16, 3, 32, 32)]}


@pytest.mark.parametrize("name", MAKE)
def test_only_the_last_layer_of_dino_waits(name):
    method = make(name)
    for progress, trained in ((0.0, name != "dino"), (0.01, True), (0.005, name != "dino")):
        method.zero_grad()
        method.step(recipe_of(method, slow_start=0.0), batch_of(method), progress=progress)
        *others, last = method.encoder.parameters()
        assert all(parameter.grad is not None for parameter in others)
        assert (last.grad is not None) == trained


def test_the_centre_of_dino_follows_the_teacher_and_shifts_its_targets():
    method = make("dino")
    expected = torch.zeros(DIM, dtype=torch.float64)
    for number, (progress, temperature) in enumerate(((0.0, 0.04), (0.05, 0.055), (0.1, 0.07), (0.9, 0.07))):
        again, batch = copy.deepcopy(method), batch_of(method, number)
        targets = again.prepare(batch, progress)
        outputs = again.momentum_encoder(torch.cat(batch.views[:2]))  # in training, BatchNorm sees the same batch
        for target, output in zip(targets, outputs.chunk(2), strict=False):
            torch.testing.assert_close(target, (output - expected) / temperature, rtol=1e-9, atol=1e-9)
        method.step(recipe_of(method), batch, progress)
        expected = 0.9 * expected + 0.1 * outputs.mean(0)
        torch.testing.assert_close(method.center, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_last_layer_of_dino_gives_cosines_at_every_width(width):
    method = make("dino")
    small = slimmable.extract(method.encoder, width).eval()
    images = batch_of(method).views[0]
    hidden = small.projector[:-1](small.backbone(images))
    weight = small.projector[-1].weight
    assert weight.shape == (DIM, round(256 * width))
    with slimmable.at_width(method.encoder.eval(), width):
        torch.testing.assert_close(method.encoder(images), cosines(hidden, weight), rtol=1e-9, atol=1e-9)


def test_dino_trains_a_transformer_for_images_of_several_sizes():
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=0, img_size=32, dynamic_img_size=True)
    plain = methods.Encoder(backbone, methods.DINO.projector(64, HIDDEN, DIM)).double()
    example = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    method = methods.DINO(
        slimmable.slimify(plain, WIDTHS, example_inputs=example), proj_dim=DIM, local_crops=3
    ).double()
    found, batch = {}, batch_of(method)
    for width in method.step(recipe_of(method), batch, progress=0.8):
        with slimmable.at_width(method.encoder, width), torch.no_grad():
            small = slimmable.extract(method.encoder, width)
            found[width] = all(torch.equal(method.encoder(view), small(view)) for view in batch.views)
    assert found == dict.fromkeys(WIDTHS, True)


@pytest.mark.parametrize(("name", "half"), [("simsiam", 2.0), ("barlowtwins", None)])
def test_the_distillation_of_a_method_without_logits_is_its_own_distance(name, half):
    """Half of 1 - cosine for SimSiam; for Barlow Twins the sum of 1 - correlation over features."""
    method, other = make(name), make(name)
    other.load_state_dict({key: value + 0.1 if value.ndim > 1 else value for key, value in other.state_dict().items()})
    batch = batch_of(method)
    with torch.no_grad():
        pairs = [(each.embed(batch.views), each(batch).embeddings) for each in (method, other)]
        (raw, ours), (others, theirs) = pairs
        for mine, his, a, b in zip(raw, others, ours, theirs, strict=True):
            if half:
                p, q = method.online_predictor(mine), other.online_predictor(his)
                expected = (1 - F.cosine_similarity(p, q)).mean() / half
            else:
                a0, b0 = (F.batch_norm(each, None, None, training=True) for each in (mine, his))
                expected = ((a0 - b0).square().mean(0) / 2).sum()
            torch.testing.assert_close(method.distillation()(a, b), expected, rtol=1e-9, atol=1e-9)
