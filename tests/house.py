"""The house as its sources draw it: which file imports which, where circles are, who speaks to other ranks.

Everything is read from syntax trees. An import counts wherever it stands: at the top of a file, inside a function, or
for type checkers alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("kernels", "lasp", "parallel", "launch")  # each may import those to its left
COLLECTIVES = (
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "reduce",
    "scatter",
    "send",
)


class House:
    """The sources below ``root``, as the modules that they install as.

    Attributes:
        files: path of each module, by its dotted name.
        trees: syntax tree of each module.
    """

    def __init__(self, root: Path):
        self.root = root
        self.files: dict[str, Path] = {}
        for room in ROOMS:
            for path in sorted((root / room).rglob("*.py")):
                inside = path.relative_to(root / room).with_suffix("").parts
                parts = [part for part in inside if part != "__init__"]
                self.files[".".join([package_of(room), *parts])] = path
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}

    def relative(self, module: str) -> str:
        """The path of a module below the root."""
        return self.files[module].relative_to(self.root).as_posix()

    def room(self, module: str) -> str:
        """The room that a module is in."""
        return self.relative(module).partition("/")[0]

    def place(self, module: str) -> str:
        """The sub-room of a module; of a file that lies flat in its room the file itself."""
        parts = self.relative(module).split("/")
        return "/".join(parts[:2])

    def imports(self, module: str) -> Iterator[tuple[str, bool]]:
        """Every name that a module imports, dotted, and whether at the top of the file."""
        top = {id(node) for node in self.trees[module].body}
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                yield from ((alias.name, id(node) in top) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.relative(module)}: relative import"
                yield node.module, id(node) in top
                yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)

    def own_imports(self, module: str) -> set[str]:
        """The modules of the house that a module imports: the innermost that each name leads to."""
        found = set()
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in self.files}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in self.files else node.module for name in names}
        return {name for name in found if name in self.files} - {module}

    def file_graph(self) -> dict[str, set[str]]:
        """Imports between modules."""
        return {module: self.own_imports(module) for module in self.files}

    def folder_graph(self) -> dict[str, set[str]]:
        """Imports between sub-rooms, and files that lie flat."""
        graph: dict[str, set[str]] = {}
        for module, imported in self.file_graph().items():
            targets = graph.setdefault(self.place(module), set())
            targets |= {self.place(name) for name in imported} - {self.place(module)}
        return graph

    def imports_by_name(self) -> list[str]:
        """Where a module of the house is imported by a text that names it."""
        found = []
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                function, text = ast.unparse(node.func), ast.unparse(node.args[0])
                if function.split(".")[-1] in ("import_module", "__import__") and (
                    "lasp" in text or "__name__" in text
                ):
                    found.append(f"{self.relative(module)}:{node.lineno}")
        return found

    def traffic(self) -> list[str]:
        """Where torch.distributed is asked to send: ``file:line name``."""
        found = []
        for module, tree in self.trees.items():
            names = {}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                    names |= {alias.asname or alias.name: alias.name for alias in node.names}
            for node in ast.walk(tree):
                called = None
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed"):
                    called = node.attr
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    called = names.get(node.id)
                if called is not None and called.startswith(COLLECTIVES):
                    found.append(f"{self.relative(module)}:{node.lineno} {called}")
        return found


def package_of(room: str) -> str:
    """The import name of a room."""
    return "lasp" if room == "lasp" else f"lasp.{room}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach one another, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found
