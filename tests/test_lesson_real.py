"""Lesson 15 in the form that its page does not show: with released weights. Tiny random models in transformers' own
files stand where the hub's would be, and every cell runs."""

import build_notebooks
import pytest
import torch
from PIL import Image

from minivlp.data.batch import to_tensor
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer

transformers = pytest.importorskip("transformers")
LESSON = next(build_notebooks.ROOT.glob("notebooks/*/15_real_weights.py"))
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*means nothing before it is trained",
    "ignore:FigureCanvasAgg is non-interactive",
    "ignore:No font on this machine",  # random models write Chinese, too
)


LOADING = "def stand_ins("  # in the cell that loads the models


def run(until: str | None = None, **settings) -> dict:
    """Run the lesson's code cells but for the exercise, up to the one that has the text `until`; returns its variables.

    `settings` take the place of the lesson's own once these are made.
    """
    space = {"__name__": "lesson"}
    cells = [cell for cell in build_notebooks.load(LESSON).cells if cell.cell_type == "code"]
    ends = next((n for n, cell in enumerate(cells) if until and until in cell.source), len(cells) - 1)
    exercise = {"exercise", "needs-solution"}
    for cell in [cell.source for cell in cells[: ends + 1] if not exercise & set(cell.metadata.get("tags", []))]:
        exec(compile(cell, LESSON.name, "exec"), space)
        if "HUB = {" in cell:
            assert settings.keys() <= space.keys() and set(settings.get("HUB", space["HUB"])) == set(space["HUB"])
            space |= settings
    return space


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What stands for each model of the hub: a folder with a tiny random one, its tokenizer and image processor."""
    tokenizer, folder = load_tokenizer(), tmp_path_factory.mktemp("hub")
    image = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    image |= dict(image_size=32, patch_size=8)
    words = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
    words |= dict(max_position_embeddings=40, pad_token_id=0)
    clip = transformers.CLIPConfig(
        text_config=words | dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2), vision_config=image
    )
    vilt = transformers.ViltConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **image)
    ids = dict(vocab_size=len(tokenizer) + 2, bos_token_id=len(tokenizer), sep_token_id=2, eos_token_id=2)
    blip = transformers.BlipConfig(
        text_config=words | ids | dict(encoder_hidden_size=32), vision_config=image, image_text_hidden_size=20
    )
    square = {"size": {"height": 32, "width": 32}}
    processors = {
        "clip": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square["size"]),
        "vilt": transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8),
        "blip": transformers.BlipImageProcessor(**square),
    }
    torch.manual_seed(0)
    models = {
        "clip": transformers.CLIPModel(clip),
        "vilt_words": transformers.ViltForMaskedLM(vilt),
        "vilt_match": transformers.ViltForImageAndTextRetrieval(vilt),
        "blip_writes": transformers.BlipForConditionalGeneration(blip),
        "blip_match": transformers.BlipForImageTextRetrieval(blip),
    }
    for name, model in models.items():
        for weight in model.parameters():  # as they are made, some are too small to matter
            weight.data += 0.05 * torch.randn_like(weight)
        for part in (model, tokenizer, processors[name.split("_")[0]]):
            part.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def test_every_cell_runs_with_released_weights_and_a_picture_of_ones_own(hub, tmp_path):
    mine = tmp_path / "mine.png"
    Image.new("RGBA", (90, 40), "red").save(mine)
    lesson = run(ASK_THE_HUB=True, HUB=hub, MY_PICTURE=str(mine))
    assert lesson["released"] and [one.source for one in lesson["loaded"].values()] == list(hub.values())
    assert len(lesson["written"]) == 13 and lesson["chances"].shape == (13, 16)
    assert not any(text.startswith("a picture of") for text in lesson["written"])  # they were given, not written
    kinds = {"object", "color", "size", "relation", "swap", "count", "mean"}
    assert [set(scores) for scores in lesson["tested"].values()] == [kinds] * 3
    assert [(name, len(right)) for name, right in lesson["prefers"].items()] == [
        (name, len(lesson["PAIRS"])) for name in ("CLIP", "ViLT", "BLIP")
    ]
    assert set(lesson["winoground"]) == {
        f"{n}, {k}" for n in ("CLIP", "ViLT", "BLIP") for k in ("text", "image", "group")
    }
    assert all(score.n == len(lesson["RIGHT_OF"]) for score in lesson["winoground"].values())
    assert [tuple(maps.shape) for maps in lesson["found"]] == [(n, 4, 4) for n in (3, 4, 3, 3)]
    on_its_own_terms(lesson)


def on_its_own_terms(lesson):
    """A measure's pixels reach each model as its own image processor would have made them, and only inside `with`."""
    scenes = Scenes(3, size=32)
    ours = to_tensor(scenes.pixels(range(3), 32))
    for one in lesson["loaded"].values():
        theirs = one([scenes[row].image for row in range(3)])["images"]
        joint = getattr(one.model, "joint", None)
        patches = (one.model.image.embed if joint is None else joint.image_embed).cut
        with torch.no_grad():
            with one.on_our_pixels():
                inside = patches(ours)
            assert torch.allclose(inside, patches(theirs), atol=1e-5)
            assert torch.allclose(patches(ours), inside, atol=1e-3) == (one.processor.image_mean[0] == 0.5)


def test_a_hub_that_does_not_answer_is_said_in_one_line_and_the_small_ones_stand_in(capsys):
    """Here no network can be reached, and the cache is asked by a name that nobody has."""
    names = ("clip", "vilt_words", "vilt_match", "blip_writes", "blip_match")
    lesson = run(LOADING, ASK_THE_HUB=True, HUB=dict.fromkeys(names, "nobody/has-this"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("stand-ins: "))
    assert "trained on drawn scenes (the model hub does not answer: " in line and not lesson["released"]


def test_the_quick_profile_does_not_even_ask(monkeypatch):
    def ask(*_, **__):
        raise AssertionError("asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    lesson = run(LOADING)
    assert lesson["reason"] == "ASK_THE_HUB is False" and not lesson["released"]
