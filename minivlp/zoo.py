"""The table of models: verbs, parameters, length of the code, released weights, lesson."""

from __future__ import annotations

import inspect
import io
import tokenize
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from minivlp.papers import PAPERS

VERBS = (
    "encode_image",
    "encode_text",
    "embed_images",
    "similarity",
    "cross_encode",
    "match",
    "mlm_logits",
    "generate",
    "caption_logprob",
    "ground",
)
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def zoo() -> list[dict[str, str]]:
    """One row per paper, in columns that are named as their headings."""
    rows = []
    for paper in PAPERS.values():
        kind = paper.model_class()
        row = {"model": paper.name, "verbs": " ".join(verb for verb in VERBS if hasattr(kind, verb))}
        row |= {"nano": f"{parameters(kind, 'nano') / 1e6:.1f} M", "paper": f"{parameters(kind, 'paper') / 1e6:.0f} M"}
        row |= {"code lines": str(code_lines(inspect.getmodule(kind))), "weights": paper.weights}
        rows.append(row | {"lesson": paper.lesson})
    return rows


def parameters(kind: type[nn.Module], preset: str) -> int:
    """Number of trainable parameters of a model; those of a momentum model are not."""
    with torch.device("meta"):
        model = kind(getattr(kind.Config, preset)())
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def code_lines(module: ModuleType) -> int:
    """Lines of a module's file that are neither blank nor comment nor docstring."""
    lines: set[int] = set()
    previous = tokenize.INDENT
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(module)).readline):
        docstring = token.type == tokenize.STRING and previous in (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL)
        if token.type not in NO_CODE and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        previous = token.type if token.type != tokenize.COMMENT else previous
    return len(lines)


def in_columns(rows: list[dict[str, str]]) -> str:
    """The rows below their headings, in columns of equal width."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return "\n".join("  ".join(f"{line[key]:<{widths[key]}}" for key in widths).rstrip() for line in lines)


def as_markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a markdown table for a page in docs/: verbs as code, lessons as links to their notebooks."""
    folder = Path(__file__).resolve().parents[1] / "notebooks"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        notebook = next(folder.glob(f"{row['lesson']}_*.ipynb"), None) if row["lesson"] else None
        link = f"[{row['lesson']}](../notebooks/{notebook.name})" if notebook else row["lesson"]
        verbs = " ".join(f"`{verb}`" for verb in row["verbs"].split())
        lines.append(list({**row, "verbs": verbs, "lesson": link}.values()))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
