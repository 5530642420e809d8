"""Half precision, and input as bad as it gets: every loss stays finite, with its gradients, and is that of float32."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from slimmable import losses
from slimmable.evaluation import probe_loss


def queue_of(z):
    return z.detach().flip(0, 1).T


def distillation(kind):
    return lambda student, teacher: losses.OnlineDistillation(kind)(student, teacher)


LOSSES = {
    "nt_xent": losses.nt_xent,
    "info_nce": lambda query, key: losses.info_nce(query, key, queue_of(query)),
    "moco_v3": lambda query, keys: losses.moco_v3_loss(query, keys, 0.2),
    "byol": losses.byol_loss,
    "vicreg": losses.vicreg_loss,
    "simsiam": losses.simsiam_loss,
    "barlow_twins": losses.barlow_twins_loss,
    "dino": lambda a, b: losses.dino_loss([a, b, a], [b, a], b[0].detach(), 0.5, 0.5),
    "contrast": lambda logits, _: losses.contrastive_cross_entropy(logits, 0.2),
    "probe_loss": lambda wide, narrow: probe_loss({1.0: wide, 0.5: narrow}, torch.arange(len(wide)) % wide.shape[1]),
    **{kind: distillation(kind) for kind in ("kl", "embedding", "mse", "dkd", "atkd")},
    "slim_loss": lambda a, b: losses.slim_loss(
        [losses.nt_xent(a, b), losses.nt_xent(b, a)], [distillation("kl")(a, b)], losses.width_weights((1.0, 0.5))
    ),
}


@st.composite
def views(draw):
    """Two matrices of the same shape: random rows, some of them zero, or all alike."""
    shape = draw(st.integers(2, 6)), draw(st.integers(3, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    pair = torch.randn(2, *shape, generator=generator)
    rows = draw(st.sampled_from(["any", "some zero", "zero", "identical", "both the same"]))
    if rows == "some zero":
        pair *= torch.rand(2, shape[0], 1, generator=generator) < 0.5
    elif rows == "zero":
        pair *= 0
    elif rows == "identical":
        pair = pair[:, :1].expand(-1, shape[0], -1)
    elif rows == "both the same":
        pair[1] = pair[0]
    return pair


def run(loss, pair):
    leaves = [z.clone().requires_grad_() for z in pair]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [torch.zeros_like(z) if z.grad is None else z.grad for z in leaves]


@pytest.mark.parametrize("name", LOSSES)
@given(pair=views(), scale=st.sampled_from([1.0, 1e4]), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_half_precision_is_that_of_float32_rounded(name, pair, scale, dtype):
    if name == "vicreg" and dtype == torch.float16:
        scale = 1.0  # its gradient grows with the cube of the scale, beyond the largest number of float16
    pair = (scale * pair).to(dtype)
    value, gradients = run(LOSSES[name], pair)
    expected, exact = run(LOSSES[name], pair.float())
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert torch.equal(value, expected)
    for gradient, float32 in zip(gradients, exact, strict=True):
        assert gradient.isfinite().all()
        rounding = 3 * torch.finfo(dtype).eps  # slim_loss adds three gradients up
        atol = rounding * (float32.abs().max().item() + torch.finfo(dtype).tiny)
        torch.testing.assert_close(gradient.float(), float32, rtol=rounding, atol=atol)


@pytest.mark.parametrize("name", LOSSES)
@given(pair=views())
@settings(max_examples=20, deadline=None)
def test_float32_is_float64_rounded(name, pair):
    value, gradients = run(LOSSES[name], pair)
    expected, exact = run(LOSSES[name], pair.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    lengths = pair.norm(dim=2)
    if name in ("vicreg", "contrast", "probe_loss", "kl", "mse", "dkd", "atkd") or lengths.min() > 0.1:
        for gradient, float64 in zip(gradients, exact, strict=True):
            torch.testing.assert_close(gradient.double(), float64, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "moco_v3", "byol", "embedding"])
def test_a_zero_embedding_gets_no_gradient_and_changes_no_other(name):
    pair = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pair[0, 1] = 0
    short = pair.clone()
    short[0, 1] = 1e-14
    value, (gradient, _) = run(LOSSES[name], pair)
    near, (near_gradient, _) = run(LOSSES[name], short)
    assert torch.equal(gradient[1], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(near, value)
    torch.testing.assert_close(near_gradient, gradient)
    assert gradient[[0, 2, 3]].abs().sum() > 0
