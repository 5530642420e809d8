"""Every published loss case: totals, per-width terms and gradients of the raw embeddings, in float64."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from slimmable import losses

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "slimclr_losses.json").read_text())
TENSORS = load_file(GOLDEN / "slimclr_losses.safetensors")
VICREG = load_file(GOLDEN / "vicreg.safetensors")
KINDS = {"seed": "kl", "inplace": "embedding", "mse1": "mse", "mse2": "mse", "dkd": "dkd", "atkd": "atkd"}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def embeddings(view, widths):
    return [TENSORS[f"{view}/{width:g}"].clone().requires_grad_() for width in widths]


def outputs_per_width(case, z, z2):
    """Contrastive losses and logits; MoCo v3 as two directions, which the published code treats as two losses."""
    temperature = case["T"]
    if case["framework"] == "mocov2":
        rest = TENSORS["k"], TENSORS["queue"]
        return [([losses.info_nce(q, *rest, temperature) for q in z], [losses.moco_logits(q, *rest) for q in z], z)]
    if case["framework"] == "simclr":
        contrastive = [losses.nt_xent(a, b, temperature) for a, b in zip(z, z2, strict=True)]
        logits = [losses.nt_xent_logits(a, b) for a, b in zip(z, z2, strict=True)]
        return [(contrastive, logits, z)]
    return [
        (
            [losses.moco_v3_loss(q, k, temperature) for q in queries],
            [losses.moco_v3_logits(q, k, temperature) for q in queries],
            queries,
        )
        for queries, k in ((z, TENSORS["k2"]), (z2, TENSORS["k1"]))
    ]


def terms_of(case, contrastive, logits, raw):
    if not case["enable_slim"]:
        return [losses.slim_loss(contrastive[:1])]
    narrower = range(1, len(contrastive))
    taught = [None] * len(contrastive)
    if case["framework"] == "simclr" and case["distill"] in ("inplace", "mse1"):
        taught[1:] = [torch.zeros((), dtype=torch.float64) for _ in narrower]  # published slip: no teacher is found
    elif case["distill"] != "none":
        every = case["full_distill"] and case["framework"] == "mocov2"
        distill = losses.OnlineDistillation(
            KINDS[case["distill"]], case["Tt"], case["Ts"], "all wider" if every else "widest", case["aux"]
        )
        compared = {"inplace": raw, "mse1": [F.normalize(z) for z in raw]}.get(case["distill"], logits)
        taught[1:] = [distill(compared[i], compared[:i]) for i in narrower]
    return [
        losses.slim_term(c, a, weight, case["aux"])
        for c, a, weight in zip(contrastive, taught, case["loss_weights"], strict=True)
    ]


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: f"{case['name']}-{case['distill']}")
def test_published_case(case):
    name, widths = case["name"], case["widths"]
    z, z2 = embeddings("z", widths), embeddings("z2", widths)
    directions = [terms_of(case, *outputs) for outputs in outputs_per_width(case, z, z2)]
    total = sum(term for terms in directions for term in terms)
    close(total, TENSORS[f"{name}/loss"])
    close(torch.stack(directions[0]), TENSORS[f"{name}/losses"][: len(directions[0])])
    total.backward()
    for view, leaves in (("z", z), ("z2", z2)):
        if f"{name}/grad_{view}" in TENSORS:
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            close(torch.stack(gradients), TENSORS[f"{name}/grad_{view}"])


def test_all_cases_are_here():
    assert len(MANIFEST["cases"]) == 138


def test_moco_logits_and_info_nce():
    rest = TENSORS["k"], TENSORS["queue"]
    z = embeddings("z", (1.0, 0.75, 0.5, 0.25))
    close(losses.moco_logits(z[0], *rest), TENSORS["mocov2/logits_w1"])
    close(torch.stack([losses.info_nce(q, *rest, 0.2) for q in z]), TENSORS["mocov2/infonce_T0.2"])


def divergence(case):
    target = TENSORS["kd/labels"]
    name = case["name"]
    if "/kd_v2" in name:
        return lambda s, t: losses.soft_cross_entropy(s, t, case["Tt"], case["Ts"])
    if "/dkd" in name:
        return lambda s, t: losses.decoupled_distillation(s, t, target, case["alpha"], case["beta"], case["T"])
    if "atkd_v2" in name:
        return lambda s, t: losses.standardised_distillation(s, t, case["T"], case["multiplier"])
    return losses.squared_error


@pytest.mark.parametrize(
    "case",
    [case for case in MANIFEST["kd_cases"] if "_v1" not in case["name"]],  # v1: published, but not used in training
    ids=lambda case: case["name"],
)
def test_published_divergence(case):
    student = TENSORS["kd/student_logits"].clone().requires_grad_()
    teacher = TENSORS["kd/teacher_logits"].clone().requires_grad_()
    loss = divergence(case)(student, teacher)
    loss.backward()
    close(loss, TENSORS[f"{case['name']}/loss"])
    close(student.grad, TENSORS[f"{case['name']}/grad_student"])
    assert teacher.grad is None


@pytest.mark.parametrize(("ts", "tt"), [(1, 1), (5, 5), (1, 5), (4, 2)])
def test_soft_cross_entropy_is_the_divergence_plus_the_teachers_entropy(ts, tt):
    student = TENSORS["kd/student_logits"].clone().requires_grad_()
    teacher = TENSORS["kd/teacher_logits"]
    log_teacher = (teacher / tt).log_softmax(1)
    entropy = -(log_teacher.exp() * log_teacher).sum(1).mean() * ts**2
    loss = losses.soft_cross_entropy(student, teacher, tt, ts)
    loss.backward()
    close(loss - entropy, TENSORS[f"kd/kd_v1_Ts{ts}_Tt{tt}/loss"])
    close(student.grad, TENSORS[f"kd/kd_v1_Ts{ts}_Tt{tt}/grad_student"])


PUBLISHED_MODES = {
    0: "ones",
    1: "share",
    2: "width",
    3: "scaled_share",
    4: "ones",
    5: "widest_plus_rest",
    6: "narrower_sums",
    7: "widest_plus_second",
}


@pytest.mark.parametrize("case", MANIFEST["loss_weights"], ids=lambda case: f"{case['mode']}-{case['widths']}")
def test_published_weights(case):
    widths, mode = case["widths"], PUBLISHED_MODES[case["mode"]]
    if isinstance(case["weights"], str):
        with pytest.raises(ValueError, match="at least two widths"):
            losses.width_weights(widths, mode)
        return
    expected = case["weights"]
    if mode == "narrower_sums" and widths != sorted(widths, reverse=True):
        # The published sums go by the order of the list; models always pass it sorted. Ours go by the widths.
        descending = sorted(widths, reverse=True)
        published = next(c["weights"] for c in MANIFEST["loss_weights"] if (c["widths"], c["mode"]) == (descending, 6))
        expected = [published[descending.index(width)] for width in widths]
    assert losses.width_weights(widths, mode) == pytest.approx(expected, abs=1e-3)


def test_published_vicreg():
    z1, z2 = (VICREG[f"vicreg/{name}"].clone().requires_grad_() for name in ("z1", "z2"))
    loss = losses.vicreg_loss(z1, z2)
    loss.backward()
    close(loss, VICREG["vicreg/loss"])
    close(z1.grad, VICREG["vicreg/grad_z1"])
    close(z2.grad, VICREG["vicreg/grad_z2"])


def test_published_vicreg_parts():
    z1, z2 = VICREG["vicreg/z1"], VICREG["vicreg/z2"]
    close(losses.vicreg_loss(z1, z2, 1, 0, 0), VICREG["vicreg/sim"])
    close(losses.vicreg_loss(z1, z2, 0, 1, 0), VICREG["vicreg/var"])
    close(losses.vicreg_loss(z1, z2, 0, 0, 1), VICREG["vicreg/cov"])
