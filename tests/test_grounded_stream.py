"""The single stream that ViLT and VLMo start from: nouns and their boxes, its losses, what a start carries over."""

from dataclasses import replace

import pytest
import torch

from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize, word_ids
from minivlp.layers.embeddings import TextConfig
from minivlp.models.vilt import ViLT, ViLTConfig
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.training.checkpoint import load_model, save_model
from minivlp.training.grounded_stream import GroundedStream, grounded_batches, named_objects
from minivlp.training.loop import Settings, fit

TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    return Scenes(64, "train", 3, size=64)


def model(seed=0) -> GroundedStream:
    torch.manual_seed(seed)
    return GroundedStream(ViLTConfig.nano(len(TOKENIZER)))


def test_every_noun_of_every_wording_has_the_box_of_its_object(scenes):
    for row in range(len(scenes)):
        scene = scenes.scene(row)
        by_noun = {region.phrase: region.box for region in scene.regions() if region.kind == "object"}
        for caption in scene.captions():
            found = named_objects(scene, caption)
            assert len(found) == len(scene.objects)
            for word, box in found:
                noun = caption.split()[word]
                if f"a {noun}" in by_noun or f"an {noun}" in by_noun:  # no other object has this noun
                    expected = by_noun.get(f"a {noun}") or by_noun[f"an {noun}"]
                    assert box == pytest.approx(expected)


def test_two_objects_with_one_noun_are_told_apart_by_the_order_of_the_caption(scenes):
    def twins(scene):
        nouns = [one.noun for one in scene.objects]
        return len(scene.objects) == 2 and nouns[0] == nouns[1]

    many = Scenes(3000, "train", 3, size=64)
    scene = next(many.scene(row) for row in range(len(many)) if twins(many.scene(row)))
    short, _, reverse, _ = scene.captions()
    forward = [box for _, box in named_objects(scene, short)]
    assert [box for _, box in named_objects(scene, reverse)] == forward[::-1] and forward[0] != forward[1]


def test_a_batch_points_at_the_tokens_of_its_nouns(scenes):
    batch = grounded_batches(scenes, TOKENIZER, 16)(0)
    nouns = [TOKENIZER.decode([i]) for i in batch.text.ids[batch.rows, batch.places].tolist()]
    assert len(nouns) == len(batch.boxes) and all(noun.isalpha() for noun in nouns)
    again = grounded_batches(scenes, TOKENIZER, 16)(0)
    assert torch.equal(batch.boxes, again.boxes) and torch.equal(batch.text.ids, again.text.ids)
    assert not torch.equal(batch.text.ids[:, :4], grounded_batches(scenes, TOKENIZER, 16)(1).text.ids[:, :4])


def test_the_losses_start_at_a_blind_guess_and_fall_on_one_batch(scenes):
    batch, stream = grounded_batches(scenes, TOKENIZER, 8)(0), model()
    first = stream.losses(batch)
    assert first["mlm"].item() == pytest.approx(torch.tensor(len(TOKENIZER)).float().log().item(), abs=0.7)
    history = fit(stream, lambda step: batch, Settings(25, warmup=3), bar=False)
    assert history.steps[-1]["loss"] < 0.7 * history.steps[0]["loss"]


def test_boxes_are_read_below_the_last_block_and_only_words_above(scenes):
    batch, stream = grounded_batches(scenes, TOKENIZER, 8)(0), model().eval()
    before = stream.boxes(batch)
    torch.nn.init.normal_(stream.joint.blocks[-1].feed_forward.up.weight)
    assert torch.equal(stream.boxes(batch), before)


def test_vilt_and_vlmo_compute_what_the_stream_computes(tmp_path):
    save_model(model(), tmp_path / "stream.safetensors")
    stream = load_model(GroundedStream, tmp_path / "stream.safetensors").double()
    vilt, config = ViLT(ViLTConfig.nano(len(TOKENIZER))), VLMoConfig.nano(len(TOKENIZER))
    vlmo = VLMo(replace(config, text=replace(config.text, embed_norm=True)))
    text = tokenize(TOKENIZER, ["a dog left of a cup", "a red heart"], 56)
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        expected = stream.mlm_logits(images, text)
        for other in (vilt, vlmo):
            other.init_from(stream)
            found = other.double().eval().mlm_logits(images, text)
            assert torch.allclose(found[text.mask], expected[text.mask], atol=1e-9)


def test_a_stream_of_other_sizes_is_refused():
    config = ViLTConfig.nano(len(TOKENIZER))
    longer = replace(config, text=TextConfig(len(TOKENIZER), 40, 0, config.text.block, embed_norm=True))
    with pytest.raises(ValueError, match="other sizes than ViLT"):
        ViLT(longer).init_from(model())


def test_the_words_of_relations_are_single_tokens():
    ids = word_ids(TOKENIZER, ("left", "right", "above", "below"))
    assert sorted(TOKENIZER.decode([i]) for i in ids) == ["above", "below", "left", "right"]
