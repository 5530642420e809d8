"""Checks by name, each in an environment of its own: `nox -s test`, `nox -s floor -- tests/layers`."""

import nox

nox.options.sessions = ["lint", "test", "docs"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CORE = [f"tests/{room}" for room in ("layers", "convert", "losses", "training", "evaluation", "life")]


@nox.session
def test(session: nox.Session) -> None:
    """Run the tests, or those that are named."""
    session.install("-e", ".[test,integrations]")
    session.run("pytest", "-n", "2", "--dist", "loadfile", *session.posargs, env=ONE_THREAD)


@nox.session
def floor(session: nox.Session) -> None:
    """Run the core tests on the oldest torch that is supported."""
    session.install("-e", ".[cli,test-core]", "torch==2.6.0")
    session.run("pytest", "-n", "2", "--dist", "loadfile", *(session.posargs or CORE), env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[test,integrations,lint]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages."""
    session.install("-e", ".[docs]")
    session.run("properdocs", "build", "--strict", "--site-dir", "site")


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark quickly, to see that it runs."""
    session.install("-e", ".[test]")
    question = session.posargs[0] if session.posargs else "overhead"
    session.run("python", "-m", f"benchmarks.{question}.run", "--quick", "--out", session.create_tmp(), env=ONE_THREAD)
