"""The cells of a lesson that show widgets, with all that they need and little else: what a browser can wait for."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator
from pathlib import Path

import build_notebooks
from nbformat import NotebookNode

WIDGETS = {"AttentionViewer", "FilterBoard", "Grounder", "LiveCurves", "RetrievalBrowser"}
COMPREHENSIONS = {"listcomp", "setcomp", "dictcomp", "genexpr"}


class Names:
    """The names of one cell: `used` of what stands above; `later`, when a function of it is called; `sure`: set for
    certain; `defined`: perhaps."""

    def __init__(self, code: str) -> None:
        self.used, self.later, self.sure, self.defined = set(), set(), set(), set()
        for statement in _in_order(ast.parse(code).body):
            top = symtable.symtable(ast.unparse(statement), "statement", "exec")
            at_once = [table for table in top.get_children() if table.get_name() in COMPREHENSIONS]
            called = [table for table in top.get_children() if table.get_name() not in COMPREHENSIONS]
            self.used |= (
                {s.get_name() for s in top.get_symbols() if s.is_referenced()} | _globals(at_once)
            ) - self.sure
            self.later |= _globals(called)
            set_here = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
            self.defined |= set_here
            if not isinstance(statement, ast.If | ast.For | ast.While | ast.Try):
                self.sure |= set_here


def widget_cells(source: Path) -> NotebookNode:
    """The lesson as a notebook of its code cells that show widgets, and of the cells before that these depend on."""
    lesson = build_notebooks.solved(build_notebooks.load(source))
    cells = [cell for cell in lesson.cells if cell.cell_type == "code"]
    names = [Names(cell.source) for cell in cells]
    kept: set[int] = set()
    for index, cell in enumerate(names):
        if (cell.used | cell.later) & WIDGETS:
            kept |= {index} | _needed(names, index)
    lesson.cells = [cells[index] for index in sorted(kept)]
    return lesson


def _needed(names: list[Names], index: int) -> set[int]:
    """Which cells before this one it depends on: walk back, and forget a name where it is certainly set."""
    later = names[index].later
    while True:
        wanted, kept = names[index].used | later, set()
        for i in reversed(range(index)):
            if names[i].defined & wanted:
                kept.add(i)
                wanted = (wanted - (names[i].sure - later)) | names[i].used
        more = set().union(*(names[i].later for i in kept)) | later
        if more == later:
            return kept
        later = more


def _globals(tables: list[symtable.SymbolTable]) -> set[str]:
    """What these scopes and those inside them read from the notebook."""
    return {
        name
        for table in tables
        for name in [s.get_name() for s in table.get_symbols() if s.is_global()] + [*_globals(table.get_children())]
    }


def _in_order(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements one by one, those inside a `with` too."""
    for statement in statements:
        if isinstance(statement, ast.With):
            yield from (ast.Expr(item.context_expr) for item in statement.items)
            names = [item.optional_vars for item in statement.items if item.optional_vars]
            yield from (ast.Assign([name], ast.Constant(None), lineno=0) for name in names)
            yield from _in_order(statement.body)
        else:
            yield statement
