"""The options, stated once: what the parser, the checks and the docs make of them; and that the parser is quick."""

import importlib.util
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, strategies as st
from torch.distributed.run import get_args_parser

import slimmable
from slimmable.__main__ import main
from slimmable.cli.commands import COMMANDS, make_parser, parse
from slimmable.cli.config import DISTILLATIONS, PretrainConfig, flag
from slimmable.errors import UsageError
from slimmable.losses import DistillationKind

ROOT = Path(__file__).parents[2]


def exits(*arguments):
    """Run the program where it ends by itself, and return the exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_needs_no_torch(command):
    code = f"""
import sys
from slimmable.__main__ import main
try:
    main({[*command, "--help"]!r})
finally:
    assert "torch" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: slimmable")


def test_the_version(capsys):
    assert exits("--version") == 0
    assert capsys.readouterr().out == f"slimmable {slimmable.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_each_help_is_one(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = " ".join(capsys.readouterr().out.split()).partition("example: slimmable ")[2]
    name, given = parse(shlex.split(example))
    assert name == command
    assert len(given) > 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_and_choices(capsys, shell):
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "--slow-start", "barlowtwins"))


def test_the_bare_program_shows_its_help(capsys):
    assert exits() == 2
    assert capsys.readouterr().err.startswith("usage: slimmable ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "slimmable dance: argument COMMAND: invalid choice: 'dance' (choose from "),
        (["pretrain", "--epoch", "3"], "slimmable pretrain: there is no option --epoch; did you mean --epochs"),
        (
            ["pretrain", "--batchsize=3"],
            "slimmable pretrain: there is no option --batchsize; did you mean --batch-size?",
        ),
        (["export", "resnet18", "--width", "1", "--xyz"], "slimmable export: there is no option --xyz\n"),
        (["evaluate", "run", "other"], "slimmable evaluate: there is no option other\n"),
        (["--loud"], "slimmable: the following arguments are required: COMMAND"),
        (["pretrain", "--opt", "adamm"], "slimmable pretrain: argument --opt: invalid choice: 'adamm' (choose from"),
        (
            ["pretrain", "--preset", "byol"],
            "slimmable pretrain: no --preset is called byol, but slimclr-mocov2-imagenet",
        ),
        (["pretrain", "--epochs", "few"], "slimmable pretrain: argument --epochs: invalid int value: 'few'"),
    ],
)
def test_typos(capsys, arguments, message):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith(message)
    assert output.out == ""


@pytest.mark.parametrize(
    ("option", "typed", "meant"), [("--method", "simcl", "simclr"), ("--preset", "byol-imagnet", "byol-imagenet")]
)
def test_typos_in_choices(capsys, option, typed, meant):
    assert main(["pretrain", option, typed]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


def test_every_kind_of_distillation_is_a_choice():
    assert ("own", "none", *get_args(DistillationKind)) == DISTILLATIONS


RANGED = [each for each in fields(PretrainConfig) if each.metadata["within"]]


@given(st.sampled_from(RANGED), st.floats() | st.integers(-3, 3))
def test_numbers_outside_their_range_are_refused(each, value):
    method = "dino" if each.name == "local_crops" else "vicreg"
    own = (value,) if each.name in ("mean", "std") else value
    given = {"method": method, "widths": (1.0,), each.name: own}
    within = each.metadata["within"]
    least, most = within
    if least <= value <= most:
        assert getattr(PretrainConfig(**given), each.name) == own
    else:
        with pytest.raises(UsageError) as caught:
            PretrainConfig(**given)
        assert str(caught.value) == f"{flag(each.name)} must be from {least} to {most:,}, got {value}"


def test_the_help_tells_defaults_and_ranges():
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    text = " ".join(commands.choices["pretrain"].format_help().split())
    assert "--epochs N passes over the training images (from 1 to 1,000,000; default: 20)" in text
    assert "--widths W [W ...] fractions of the channels, in (0, 1], including 1 (default: 1.0 0.75 0.5 0.25)" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_torchrun_passes_every_option_on(command):
    """It reads all words of its line, and stops if one of ours is the beginning of two options of its own."""
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    for option in (option for action in commands.choices[command]._actions for option in action.option_strings):
        words = [command, option, "1"]
        for launch in ([], ["--nproc_per_node=2"], ["--standalone", "--nproc-per-node", "2"]):
            line = get_args_parser().parse_args([*launch, "-m", "slimmable", *words])
            assert (line.training_script, line.training_script_args) == ("slimmable", words)


def test_torchrun_stops_at_what_begins_several_options_of_its_own(capsys):
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["-m", "slimmable", "pretrain", "--log", "tensorboard"])
    assert "ambiguous option: --log could match --log-dir" in capsys.readouterr().err


def test_the_tables_of_the_docs_are_made_from_the_options():
    path = ROOT / "docs" / "extensions" / "option_tables.py"
    spec = importlib.util.spec_from_file_location("option_tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text()
    assert page.count("<!-- options of ") == len(COMMANDS)
    assert page == tables.with_tables(page), "run: PYTHONPATH=. python docs/extensions/option_tables.py"
