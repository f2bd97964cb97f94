"""Small models and batches for the tests of all papers, and what must hold for every model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Batch, Text
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.layers import buckets
from minivlp.layers.attention import record_attention, select
from minivlp.layers.transformer import Block, Transformer
from minivlp.objectives.masking import IGNORE, MaskedTokens

VOCABULARY, LENGTH = 40, 9


def jittered(model: nn.Module) -> nn.Module:
    """The same model with every parameter changed, so that no initial zero or one hides a part."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def small_block(config: Any) -> Any:
    """The blocks of a nano model, narrower."""
    return replace(config.image.block, width=32, heads=2, hidden=64)


def small_config(kind: type, **changes: Any) -> Any:
    """The nano config of a paper with narrow blocks, images of 32 pixels and 40 tokens."""
    nano = kind.Config.nano(VOCABULARY)
    block = small_block(nano)
    image, text = replace(nano.image, image_size=32, block=block), replace(nano.text, block=block)
    return replace(nano, **{"image": image, "text": text, **changes})


def small_model(kind: type, **changes: Any) -> nn.Module:
    """A model of `small_config` whose parameters were all changed; a momentum model differs from its model."""
    return jittered(kind(small_config(kind, **changes)))


def some_texts(count: int, length: int = LENGTH, generator: torch.Generator | None = None) -> Text:
    """Random texts of 3 to `length` tokens, the first one of full length."""
    lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths
    return Text(torch.randint(7, VOCABULARY, (count, length), generator=generator) * mask, mask)


def some_batch(rows: int = 4, negatives: bool = False, seed: int | None = None, side: int = 32) -> Batch:
    """Random images with captions; with negative captions of another length if asked."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, side, side, generator=generator)
    batch = Batch(images, some_texts(rows, generator=generator), torch.arange(rows) + 100)
    if negatives:
        batch.negatives = some_texts(rows, LENGTH + 2, generator)
    return batch


def mask_some(text: Text, every: int = 3) -> MaskedTokens:
    """Every third token is to be predicted, at [MASK]; rows have different numbers of them."""
    chosen = text.mask & (torch.arange(text.length) % every == 2)
    chosen[-1] = False
    return MaskedTokens(text.with_ids(text.ids.masked_fill(chosen, 3)), text.ids.masked_fill(~chosen, IGNORE))


def longer(text: Text, extra: int = 4, filler: int = 9) -> Text:
    """The same texts with more padding, whose ids are `filler`."""
    text = text.padded(text.length + extra)
    return text.with_ids(text.ids.where(text.mask, filler))


def values_of(losses: dict[str, Tensor]) -> dict[str, float]:
    """Losses as numbers."""
    return {name: value.item() for name, value in losses.items()}


@contextmanager
def computing_everything() -> Iterator[None]:
    """All tokens of all blocks are computed, of all texts at once, and what is not read is thrown away."""
    run, attend, pays = Transformer.run, Block.attend, buckets.pays

    def run_all(self, x, layers, mask=None, context=None, context_mask=None, cache=None, rows=None, parts=None):
        x = run(self, x, layers, mask, context, context_mask, cache, None, parts)
        return x if rows is None else select(x, rows)

    def attend_all(self, x, mask=None, cache=None, rows=None):
        x = attend(self, x, mask, cache, None)
        return x if rows is None else select(x, rows)

    Transformer.run, Block.attend, buckets.pays = run_all, attend_all, lambda *_: False
    try:
        yield
    finally:
        Transformer.run, Block.attend, buckets.pays = run, attend, pays


@contextmanager
def always_in_buckets() -> Iterator[None]:
    """Texts are split by length even where that saves nothing."""
    pays, buckets.pays = buckets.pays, lambda *_: True
    try:
        yield
    finally:
        buckets.pays = pays


def assert_exact_without_shortcuts(model: nn.Module, batch: Batch, **given: Any) -> None:
    """Losses and gradients are those of a model that computes all tokens of all texts together, to 1e-10 in float64."""

    def losses_and_gradients() -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        twin = copy.deepcopy(model)  # a momentum model takes its step in each
        losses = twin.losses(batch, **given)
        sum(losses.values()).backward()
        return losses, {name: parameter.grad for name, parameter in twin.named_parameters()}

    with computing_everything():
        expected, gradients = losses_and_gradients()
    found = [losses_and_gradients()]
    with always_in_buckets():
        found.append(losses_and_gradients())
    for losses, grads in found:
        assert losses.keys() == expected.keys()
        for name, value in losses.items():
            assert (value - expected[name]).abs() < 1e-10, name
        for name, gradient in grads.items():
            assert (gradient is None) == (gradients[name] is None), name
            assert gradient is None or (gradient - gradients[name]).abs().max() < 1e-10, name


def recorded_maps(model: nn.Module, run: Any) -> dict[str, Tensor]:
    """The attention maps of `run()`, whose result must not change because they are recorded."""
    plain = run()
    with record_attention(model) as maps:
        recorded = run()
    assert torch.allclose(plain, recorded, atol=1e-12)
    return maps


SPLIT_WORDS = ["a bicycle and a giraffe in the snow", "two elephants", "a photograph of an umbrella"]


def assert_masks_whole_words(model: nn.Module) -> None:
    """All pieces of a word are predicted or none, for words that our tokenizer splits."""
    tokenizer = load_tokenizer()
    text = tokenize(tokenizer, SPLIT_WORDS * 40, model.config.text.context_length)
    batch = Batch(torch.zeros(len(text), 3, *model.config.image.size), text, torch.arange(len(text)))
    labels = model.encode(batch).masked.labels
    predicted, pieces, some = labels != IGNORE, 0, 0
    for row in range(len(text)):
        for word in text.word[row].unique():
            places = text.word[row] == word
            if word >= 0 and places.sum() > 1:
                pieces += 1
                some += int(predicted[row, places].any())
                assert predicted[row, places].all() or not predicted[row, places].any()
    assert pieces >= 100 and 0 < some < pieces
