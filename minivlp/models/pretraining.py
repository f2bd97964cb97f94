"""What all models share in training: one method per loss, and one object that keeps what the losses share.

    encoded = model.encode(batch)          nothing is computed yet
    model.itc(encoded), model.itm(encoded)   the first that needs the image tokens computes them, once

A variant of a paper overrides one method. Axes: b rows of this process, B rows of all processes together (the same when
there is one), P patches, L text tokens, R pairs, D width, E joint-embedding width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minivlp.data.batch import Batch, Text
from minivlp.data.processes import ALONE, Processes
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, find_positives
from minivlp.objectives.masking import MaskedTokens
from minivlp.objectives.matching import Negatives


class Encoded:
    """What a model computes of a batch, each part once, when it is first asked for.

    `batch` has the rows of this process, which stand at `rows` among those of all `processes`; with one process they
    are the same. `negatives` and `masked`, of the rows of all, take the place of what is otherwise drawn at random,
    `vectors` of what is otherwise computed.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        negatives: Negatives | None = None,
        masked: MaskedTokens | None = None,
        vectors: tuple[Tensor, Tensor] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.batch, self.processes = model, batch, processes
        self.given_negatives, self.given_masked = negatives, masked
        self.shares = 0  # how many losses have called `share`
        if vectors is not None:
            self.vectors = vectors

    @property
    def captions(self) -> Text:
        """The texts (b, L) that belong to our rows."""
        return self.batch.text

    @cached_property
    def rows(self) -> slice:
        """Where our rows stand among those of all processes."""
        return self.processes.place(len(self.captions))

    @cached_property
    def all_captions(self) -> Text:
        """The captions (B, L) of all processes."""
        return self.processes.gather_text(self.captions)

    @cached_property
    def image_tokens(self) -> Tensor:
        """(b, 1+P, D), or what a frozen tower computed before (`Batch.image_tokens`)."""
        if self.batch.image_tokens is not None:
            return self.batch.image_tokens
        return self.model.encode_image(self.batch.images)

    @cached_property
    def positives(self) -> Tensor:
        """(B, B) bool: rows of the same image or the same caption."""
        (image_ids,) = self.processes.gather(self.batch.image_ids)
        return find_positives(image_ids, self.all_captions)

    @property
    def diagonal(self) -> Tensor:
        """(B, B) bool: each row is its own only positive."""
        count = len(self.all_captions)
        return torch.eye(count, dtype=torch.bool, device=self.captions.ids.device)

    @cached_property
    def excluded(self) -> Tensor:
        """(B, B) bool: which rows may not be drawn as negatives of each other."""
        return self.positives if self.elsewhere is None else self.positives | self.elsewhere

    @cached_property
    def elsewhere(self) -> Tensor | None:
        """(B, B) bool: rows of different processes, where negatives may not be drawn across them."""
        if not self.processes.local_negatives:
            return None
        (owner,) = self.processes.gather(torch.full_like(self.captions.ids[:, 0], self.processes.rank))
        return owner[:, None] != owner

    @cached_property
    def masked(self) -> MaskedTokens:
        """Our captions with some tokens replaced; the choice is made for the captions of all processes."""
        config, generator = self.model.config, self.processes.generator
        drawn = self.given_masked or config.masking.apply(self.all_captions, config.text.vocabulary, generator)
        return MaskedTokens(drawn.text[self.rows], drawn.labels[self.rows])

    @cached_property
    def all_vectors(self) -> tuple[Tensor, Tensor]:
        """`vectors` of all processes, (B, E) each."""
        return self.processes.gather(*self.vectors)

    def contrast(
        self, own: tuple[Tensor, Tensor], everyone: tuple[Tensor, Tensor], scale: Tensor, positives: Tensor
    ) -> Tensor:
        """`contrastive_loss` of our unit vectors (b, E) with those of all processes (B, E); `positives` (B, B)."""
        logits = cosine_logits(own[0], everyone[1], scale)
        back = None if self.processes.size == 1 else cosine_logits(own[1], everyone[0], scale)  # else its transpose
        return self.share(contrastive_loss(logits, positives[self.rows], back), len(logits))

    def share(self, loss: Tensor, count: Tensor | int) -> Tensor:
        """Our share of a loss that is a mean over `count` of our items. Every term of the losses ends with it."""
        self.shares += 1
        return self.processes.share(loss, count)


class MatchedPairs(NamedTuple):
    """Texts to be matched with our images."""

    text: Text  # (T, L)
    text_rows: Tensor  # (R,) the text of each pair, a row of `text`
    image_rows: Tensor  # (R,) the image of each pair, one of ours
    matched: int  # the first pairs match, the others do not
    visitors: Text  # (V, L) the last texts: those of other processes


class MatchingEncoded(Encoded):
    """Parts of image-text matching. A subclass has `negatives`, and `text`: our captions, then our negative captions.

    A pair is computed where its image is: a text is small to send and cheap to encode again.
    """

    @cached_property
    def pairs(self) -> MatchedPairs:
        """Each row with its own image, with one drawn image and text, and with its negative caption: 3B pairs, 4B with
        negative captions, of all processes together."""
        count = len(self.captions)
        own = torch.arange(count, device=self.text.ids.device)
        false = torch.arange(count, len(self.text), device=own.device)  # negative captions, of images 0, 1, …
        images, texts = self.negatives.pairs()
        here = self.processes.ours(images, self.rows)
        images, texts = images[here] - self.rows.start, texts[here]
        text, visitors = self.text, self.text[:0]
        if self.processes.size > 1:
            foreign = (texts < self.rows.start) | (texts >= self.rows.stop)
            which, place = texts[foreign].unique(return_inverse=True)
            visitors, texts = self.all_captions[which], texts - self.rows.start
            texts[foreign] = len(text) + place
            text = Text.cat([text, visitors])
        image_rows = torch.cat([own, images, false - count])
        return MatchedPairs(text, torch.cat([own, texts, false]), image_rows, count, visitors)


class PretrainingModel(nn.Module):
    """A model whose `config.losses` names its loss terms, each a method of that name."""

    encoding = Encoded  # the class of what the losses share

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def encode(self, batch: Batch, **given: Any) -> Encoded:
        """What the losses of this batch share; `given` as in `losses`."""
        return self.encoding(self, batch, **given)

    def losses(self, batch: Batch, **given: Any) -> dict[str, Tensor]:
        """The terms of `config.losses` by name, scalars; a term that this batch cannot have is left out.

        `given`: see `Encoded`. With several `processes`, the terms are this process's shares. A momentum model, in
        training, takes its step and fills its queue here.
        """
        encoded, terms = self.encode(batch, **given), {}
        for name in self.config.losses:
            before = encoded.shares
            term = getattr(self, name)(encoded)
            if term is None:
                continue
            if encoded.processes.size > 1 and encoded.shares == before:
                raise ValueError(f"{type(self).__name__}.{name} must end with `encoded.share` for several processes")
            terms[name] = term
        return terms

    def after_step(self) -> None:
        """Called after each optimizer step: learned scales are brought back into their range."""
        for module in self.modules():
            if hasattr(module, "clamp"):
                module.clamp()
