"""The list of models: what each can be asked, how large it is, which releases load, where its lesson is."""

from __future__ import annotations

import inspect
import io
import tokenize
from pathlib import Path

import torch

from minivlp.models import MODELS
from minivlp.pretrained.origins import WEIGHTS

VERBS = ("encode_image", "encode_text", "embed_images", "similarity", "match", "fill", "generate", "ground")


def zoo() -> list[dict[str, str]]:
    """One row per model: verbs, parameters, length of its file, releases whose weights load, lesson."""
    rows = []
    for name, kind in MODELS.items():
        with torch.device("meta"):
            sizes = [kind(getattr(kind.Config, preset)()) for preset in ("nano", "paper")]
        trained = [[p for p in model.parameters() if p.requires_grad] for model in sizes]  # a teacher is not counted
        counts = [sum(p.numel() for p in params) / 1e6 for params in trained]
        source = inspect.getsource(inspect.getmodule(kind))
        skipped = (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        )
        lines = set()
        previous = tokenize.INDENT
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            docstring = token.type == tokenize.STRING and previous in (tokenize.INDENT, tokenize.NEWLINE, tokenize.NL)
            if token.type not in skipped and not docstring:
                lines.update(range(token.start[0], token.end[0] + 1))
            previous = token.type if token.type != tokenize.COMMENT else previous
        rows.append(
            {
                "model": name,
                "verbs": " ".join(verb for verb in VERBS if hasattr(kind, verb)),
                "nano": f"{counts[0]:.1f} M",
                "paper": f"{counts[1]:.0f} M",
                "code lines": str(len(lines)),
                "weights": WEIGHTS[name],
                "lesson": kind.lesson,
            }
        )
    return rows


def in_columns(rows: list[dict[str, str]]) -> str:
    """The rows below their headings, as wide as they need."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return "\n".join("  ".join(f"{line[key]:<{widths[key]}}" for key in widths).rstrip() for line in lines)


def as_markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a markdown table, verbs as code, lessons as links from docs/ where the lesson is there."""
    folder = Path(__file__).resolve().parents[1] / "notebooks"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lesson = next(folder.glob(f"{row['lesson']}_*.ipynb"), None)
        link = f"[{row['lesson']}](../notebooks/{lesson.name})" if lesson else row["lesson"]
        verbs = " ".join(f"`{verb}`" for verb in row["verbs"].split())
        lines.append(list({**row, "verbs": verbs, "lesson": link}.values()))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
