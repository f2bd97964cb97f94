"""NegCLIP: negative captions are further candidates of the images, and of nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import assert_exact_without_shortcuts, small_model, some_batch

from minivlp.models.clip import CLIP
from minivlp.models.negclip import NegCLIP

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def model():
    return small_model(NegCLIP)


@torch.no_grad()
def test_the_loss_is_that_of_a_loop(model):
    batch, scale = some_batch(4, negatives=True), model.itc_head.scale().item()
    images, texts = model.embed_images(batch.images), model.embed_texts(batch.text)
    false, loss = model.embed_texts(batch.negatives), 0.0
    for i in range(4):
        to_text = [scale * float(images[i] @ text) for text in [*texts, *false]]
        to_image = [scale * float(image @ texts[i]) for image in images]
        for logits in (to_text, to_image):
            loss += (math.log(sum(map(math.exp, logits))) - logits[i]) / 8
    assert model.losses(batch)["itc"].item() == pytest.approx(loss, abs=1e-10)


def test_where_all_vectors_are_alike_every_candidate_is_as_likely(model):
    same = torch.nn.functional.normalize(torch.ones(8, 64), dim=1)
    encoded = model.encode(some_batch(8, negatives=True), vectors=(same, same))
    encoded.all_negative_vectors = same
    assert model.itc(encoded).item() == pytest.approx((math.log(16) + math.log(8)) / 2, abs=1e-10)


def test_negative_captions_far_from_all_images_leave_clips_loss(model):
    batch, clip = some_batch(4, negatives=True), CLIP(model.config)
    clip.load_state_dict(model.state_dict())
    encoded = model.encode(batch)
    away = torch.linalg.lstsq(encoded.vectors[0], -torch.ones(4, 1)).solution.T  # its product with every image is -1
    encoded.all_negative_vectors = 1e3 * away.expand(4, -1)
    assert model.itc(encoded).item() == pytest.approx(clip.losses(batch)["itc"].item(), abs=1e-8)


def test_it_learns_to_reject_a_negative_caption(model):
    batch = some_batch(4, negatives=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model.losses(batch)["itc"].backward()
        optimizer.step()
    images = model.embed_images(batch.images)
    own, false = ((images * model.embed_texts(text)).sum(dim=1) for text in (batch.text, batch.negatives))
    assert (own > false).all()


def test_the_same_image_twice_shares_its_captions(model):
    batch = some_batch(4, negatives=True)
    same = replace(batch, image_ids=torch.tensor([7, 7, 8, 9]))
    assert not torch.isclose(model.losses(batch)["itc"], model.losses(same)["itc"])


def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(model):
    assert_exact_without_shortcuts(model, some_batch(6, negatives=True))


def test_a_batch_without_negative_captions_is_refused(model):
    with pytest.raises(ValueError, match="negative captions"):
        model.losses(some_batch(4))
