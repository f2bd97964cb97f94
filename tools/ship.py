"""Make a shipped checkpoint of a finished run: weights in half precision, the run's log, and a card with its measures.

    python -m minivlp train clip --subset 40000 --steps 2600 --out runs/clip_ship
    python tools/ship.py clip runs/clip_ship checkpoints/clip_nano

Measured on test scenes, from the very file that is shipped (half precision included).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minivlp.__main__ import measure
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.score import table
from minivlp.models import MODELS
from minivlp.training.checkpoint import load_model, load_tensors, save_model

CARD = """# {name}

{kind} with {millions:.1f} M parameters, trained from scratch on our own drawn scenes (split `train`, {scenes} per
command below) and nothing else: no photo, no text from the web, no official weights. It has seen the emoji, shapes,
colours and sizes of the scene world, and no photograph.

Made by:

```
{commands}
```

The last command ran {steps} steps in {minutes:.0f} minutes on a CPU that did other work beside it; `{name}.log.jsonl`
has every tenth of them. Weights are stored in half precision.

Measured on 1,500 test scenes (seed 7):

{scores}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="path without suffix, such as checkpoints/clip_nano")
    parser.add_argument("--commands", help="what made the run, for the card (default: the plain command)")
    options = parser.parse_args()
    kind = MODELS[options.model]
    notes = load_tensors(options.run / "model.safetensors")[1]
    rows = [json.loads(line) for line in (options.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    weights = options.out.with_name(options.out.name + ".safetensors")
    keep = {name: notes[name] for name in ("data", "scenes", "seed", "seconds")}
    save_model(load_model(kind, options.run / "model.safetensors"), weights, half=True, **keep)
    model = load_model(kind, weights)
    scores = measure(model, Scenes(1500, "test", 7), load_tokenizer())
    short = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows
    ]
    log = options.out.with_name(options.out.name + ".log.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in short[::10]), encoding="utf-8")
    settings = load_tensors(options.run / "state.safetensors")[1]["settings"]
    plain = f"python -m minivlp train {options.model} --subset {notes['scenes']} --steps {settings['steps']}"
    card = CARD.format(
        name=options.out.name,
        kind=kind.__name__,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        scenes=f"{notes['scenes']:,}",
        commands=(options.commands or plain) + f"\npython tools/ship.py {options.model} {options.run} {options.out}",
        steps=f"{settings['steps']:,}",
        minutes=notes["seconds"] / 60,
        scores=table(scores),
    )
    options.out.with_name(options.out.name + ".md").write_text(card, encoding="utf-8")
    print(table(scores))


if __name__ == "__main__":
    main()
