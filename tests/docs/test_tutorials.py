"""Each tutorial runs from top to bottom, and comes out as its text says, far enough from chance to hold anywhere."""

from pathlib import Path
from typing import Any

from tests.docs.test_examples import blocks, needs, place, run

__all__ = ["place"]  # a fixture for all tests here


def names(tutorial: str, folder: Path) -> dict[str, Any]:
    """Run a tutorial, and return what its names stand for at the end."""
    page = f"docs/tutorials/{tutorial}.md"
    needs(page)
    return run("\n".join(blocks(page, "python")), folder)


def test_simclr_trains_widths_that_are_worth_more_than_pixels_and_than_cut_ones(tmp_path):
    found = names("simclr-four-widths", tmp_path)
    trained, cut, pixels = found["trained"], found["untrained"], found["pixels"]
    assert list(trained) == [1.0, 0.75, 0.5, 0.25]
    assert min(each.linear for each in trained.values()) > pixels.linear + 0.2
    assert trained[1.0].linear > cut[1.0].linear - 0.05
    assert trained[0.25].linear > cut[0.25].linear + 0.05


def test_each_step_from_a_trained_network_to_four_widths_gives_more(tmp_path):
    table = names("pretrained-to-four-widths", tmp_path)["table"]
    assert list(table) == ["cut", "statistics", "repaired", "fine-tuned"]
    assert table["cut"][1.0] > 0.95
    assert table["cut"][0.75] + 0.2 < table["statistics"][0.75]
    assert table["statistics"][0.25] + 0.3 < table["repaired"][0.25]
    assert min(table["fine-tuned"].values()) > 0.9


def test_the_gated_network_keeps_its_budget_and_spends_more_on_some_images(tmp_path):
    found = names("dense-and-gated", tmp_path)
    share = found["share"]  # at the thresholds of the training
    assert found["dense"] > 0.95
    assert abs(share.mean() - 0.4) < 0.05
    assert share.max() > 1.15 * share.min()
    assert found["row"].macs < 0.25 * found["full"].macs  # the last static network


def test_one_file_is_smaller_than_four_and_a_cascade_beats_the_narrowest_width(tmp_path):
    found = names("model-to-phone", tmp_path)
    assert (tmp_path / "net.onnx").stat().st_size < 0.7 * sum(found["sizes"])
    session, answer, accuracy = found["session"], found["answer"], found["accuracy"]
    assert accuracy(answer.logits) > accuracy(session(found["test_images"], width=0.25)) + 0.02
    assert answer.macs < 0.6 * session.macs[1.0]
