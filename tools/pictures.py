"""Draw the README's first picture from the bundled checkpoint: `python tools/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from minivlp.data.batch import to_tensor
from minivlp.data.scenes import Scenes
from minivlp.layers.attention import record_attention
from minivlp.models.clip import CLIP
from minivlp.training.checkpoint import bundled, load_model
from minivlp.visualize import attention, drawing

OUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "hero.png"


def main() -> None:
    matplotlib.use("Agg")
    model, test = load_model(CLIP, bundled("clip_nano")), Scenes(1500, "test", 7)
    rows = [row for row in range(60) if len(test.scene(row).objects) == 2][:5]
    with torch.no_grad(), record_attention(model) as maps:
        model.encode_image(to_tensor(test.pixels(rows, model.config.image.size)))
    last = attention.to_grid(attention.cls_map(maps[f"image.{model.config.image.layers - 1}.self"]))
    figure = drawing.attention_grid([test[row] for row in rows], {"attention": last.numpy()})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=110, facecolor="white")
    print(OUT.name)


if __name__ == "__main__":
    main()
