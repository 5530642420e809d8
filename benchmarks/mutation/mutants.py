"""Faults put into the package one at a time: small changes of its code, by the operators of mutmut and three more.

What cannot be a fault is left as it is: annotations, docstrings, texts for people (messages, f-strings, strings with a
space, `__repr__`), imports, decorators, and `strict=` of `zip`.
"""

import difflib
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import libcst as cst
from libcst import matchers as m
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

SHOWN = ("__repr__", "_repr_html_", "extra_repr", "__str__", "__dir__")  # functions that only make text for people
TEXT = m.FormattedString() | m.ConcatenatedString() | m.SimpleString(m.MatchIfTrue(lambda text: " " in text))
NO_FAULT = (
    TEXT
    | m.Assign(value=TEXT)
    | m.Annotation()
    | m.Decorator()
    | m.Import()
    | m.ImportFrom()
    | m.Raise()
    | m.Arg(keyword=m.Name("strict"))
    | m.Assert()
    | m.Expr(m.SimpleString())
    | m.FunctionDef(m.OneOf(*(m.Name(name) for name in SHOWN)))
    | m.FunctionDef(decorators=[m.ZeroOrMore(), m.Decorator(m.Name("overload")), m.ZeroOrMore()])
    | m.If(m.Name("TYPE_CHECKING"))
    | m.Call(m.Name("cast") | m.Name("TypeVar") | m.Attribute(m.Name("warnings"), m.Name("warn")))
    | m.Assign([m.AssignTarget(m.Name(m.MatchRegex("__all__|_?[A-Z][a-z].*")))])  # the second is a name of a type
)


def without_call(node: cst.Call) -> Iterator[cst.BaseExpression]:
    """Take a method's call without arguments away, as that of `detach`."""
    if isinstance(node.func, cst.Attribute) and not node.args:
        yield node.func.value


def without_statement(node: cst.Expr) -> Iterator[cst.Expr]:
    """Leave a call out whose result nobody reads."""
    if isinstance(node.value, cst.Call):
        yield node.with_changes(value=cst.Ellipsis())


def turned_condition(node: cst.If) -> Iterator[cst.If]:
    """Take the other branch."""
    condition = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), condition))


OPERATORS = [
    *mutation_operators,
    (cst.Call, without_call),
    (cst.Expr, without_statement),
    (cst.If, turned_condition),
]


@dataclass(frozen=True)
class Mutant:
    """One change: in which function, of which lines, and the whole file with it."""

    path: str
    function: str
    lines: range  # of what is changed
    scope: range  # of the function around it, or of the file
    operator: str
    before: str
    after: str
    code: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same when lines move."""
        return self.path, self.function, self.before, self.after


@dataclass(frozen=True)
class _Change:
    node: cst.CSTNode
    changed: cst.CSTNode
    span: slice  # of bytes
    function: str
    lines: range
    scope: range
    operator: str
    rank: tuple[str, str]


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (ByteSpanPositionProvider, PositionProvider)

    def __init__(self, path: str, module: cst.Module, seed: int):
        super().__init__()
        self.path, self.module, self.seed = path, module, seed
        self.around: list[tuple[cst.CSTNode, str, range]] = []
        self.found: list[_Change] = []

    def lines(self, node: cst.CSTNode) -> range:
        place = self.get_metadata(PositionProvider, node)
        return range(place.start.line, place.end.line + 1)

    def draw(self, *texts: str) -> str:
        """Return the place of a text in a random order."""
        return hashlib.sha256(repr((self.seed, self.path, *texts)).encode()).hexdigest()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, NO_FAULT):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef | cst.Module):
            name = "" if isinstance(node, cst.Module) else node.name.value
            self.around.append((node, name, self.lines(node)))
        fitting = [(operator, operator(node)) for kind, operator in OPERATORS if isinstance(node, kind)]
        found = [(operator.__name__.removeprefix("operator_"), new) for operator, made in fitting for new in made]
        if found:
            self._keep(node, found)
        return True

    def _keep(self, node: cst.CSTNode, found: Iterable[tuple[str, cst.CSTNode]]) -> None:
        before = self.module.code_for_node(node)
        texts = {before}
        function = ".".join(name for _, name, _ in self.around if name)
        lines = self.lines(node.test if isinstance(node, cst.If) else node)
        for operator, new in found:
            after = self.module.code_for_node(new)
            if after not in texts and after.count("strict=True") >= before.count("strict=True"):
                rank = self.draw(function, operator, before), self.draw(after)
                span = self.get_metadata(ByteSpanPositionProvider, node)
                whole = slice(span.start, span.start + span.length)
                self.found.append(_Change(node, new, whole, function, lines, self.around[-1][2], operator, rank))
            texts.add(after)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self.around[-1][0] is original_node:
            self.around.pop()


class File:
    """The changes that are possible in one file."""

    def __init__(self, root: Path, path: str, seed: int):
        wrapper = MetadataWrapper(cst.parse_module((root / path).read_text()))
        finder = _Finder(path, wrapper.module, seed)
        wrapper.visit(finder)
        self.path, self._module, self._bytes = path, wrapper.module, wrapper.module.bytes
        self._by_line: dict[int, list[_Change]] = defaultdict(list)
        for change in finder.found:
            self._by_line[change.lines.start].append(change)

    @property
    def size(self) -> int:
        """How many lines can be changed."""
        return len(self._by_line)

    def drawn(self) -> Iterator[Mutant]:
        """Yield one mutant for each line, in an order that the seed and the text of the change decide.

        Of the operators that fit a line, each is as likely as the others.
        """
        first = [min(changes, key=lambda change: change.rank) for changes in self._by_line.values()]
        for change in sorted(first, key=lambda change: change.rank):
            code = self._with(change)
            try:
                compile(code, self.path, "exec")
            except SyntaxError:
                continue
            before, after = _difference(self._module.code, code)
            if before != after:
                yield Mutant(
                    self.path, change.function, change.lines, change.scope, change.operator, before, after, code
                )

    def _with(self, change: _Change) -> str:
        before = self._module.code_for_node(change.node).encode()
        if self._bytes[change.span] == before and b"\n" not in before:  # replacing nodes takes much longer
            new = self._module.code_for_node(change.changed).encode()
            return (self._bytes[: change.span.start] + new + self._bytes[change.span.stop :]).decode()
        return cst.ensure_type(self._module.deep_replace(change.node, change.changed), cst.Module).code


def sample(root: Path, folders: Iterable[str], every: int, seed: int) -> list[Mutant]:
    """Draw a mutant for one line of `every` that can be changed, at least one of each file."""
    drawn: list[Mutant] = []
    for path in (path for folder in folders for path in _python_files(root, folder)):
        file = File(root, path, seed)
        drawn += islice(file.drawn(), max(1, round(file.size / every)))
    return drawn


def _python_files(root: Path, folder: str) -> list[str]:
    place = root / folder
    found = [place] if place.is_file() else sorted(place.rglob("*.py"))
    return [str(path.relative_to(root)) for path in found]


def _difference(before: str, after: str) -> tuple[str, str]:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    removed, added = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return removed, added
