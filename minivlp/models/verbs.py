"""What a model can be asked, by its heads: a model has a verb if it has the head that answers.

Each class below goes with one head and is mixed into the paper's class; none has a parent of its own.
Axes: B batch, M images, N texts, R pairs, L text tokens, P patches, D width, E joint-embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minivlp.data.batch import Batch, Text
from minivlp.layers.attention import KeysValues, KVCache, gather_kv
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.generation import DecodingConfig, generate
from minivlp.objectives.captioning import caption_logprob, next_tokens
from minivlp.objectives.contrastive import cosine_logits
from minivlp.objectives.masking import IGNORE

FIRST = slice(0, 1)  # the token that sums up a sequence: class token or [CLS]


class ContrastiveVerbs:
    """Search: needs `itc_head`, `encode_image(images, rows)` and `encode_text(text, rows)`."""

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> unit vectors (B, E)."""
        return self.itc_head.embed_image(self.encode_image(images, FIRST))

    def embed_texts(self, text: Text) -> Tensor:
        """Texts (B, L) -> unit vectors (B, E)."""
        return self.itc_head.embed_text(self.encode_text(text, FIRST))

    def score(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosines (M, N) of what `embed_images` and `embed_texts` returned."""
        return cosine_logits(image_features, text_features, self.itc_head.scale())

    def similarity(self, images: Tensor, text: Text) -> Tensor:
        """`score` of every image with every text, (M, N), each encoded alone."""
        return self.score(self.embed_images(images), self.embed_texts(text))


class MatchingVerbs:
    """Image-text matching: needs `match_head`, `cross_encode(images, text, rows)` and the same with image rows."""

    def match(self, images: Tensor, text: Text) -> Tensor:
        """(B,) probability that image and text of equal rows match."""
        return self.match_head(self.cross_encode(images, text, FIRST)).softmax(dim=-1)[:, 1]

    def match_many(self, images: Tensor, image_rows: Tensor, text: Text) -> Tensor:
        """(R,) `match` of text r and image `image_rows[r]`; each image is encoded once, however many texts it has."""
        return self.match_head(self.cross_encode_many(images, image_rows, text, FIRST)).softmax(dim=-1)[:, 1]


class MaskedLMVerbs:
    """Masked language modeling: needs `mlm_head` and `cross_encode`."""

    def mlm_logits(self, images: Tensor, text: Text) -> Tensor:
        """(B, L, V) logits of the token at every place; put [MASK] where you want a prediction."""
        return self.mlm_head(self.cross_encode(images, text)[:, : text.length])


class CaptioningVerbs:
    """Captions: needs `caption_head`, `decoder` (a causal `TextEncoder` with cross-attention, or a `PrefixDecoder`),
    `encode_image`, and of `config` the fields `text.context_length`, `tokens` and `prefix_length`."""

    @property
    def start_token(self) -> int:
        """The id that every text begins with in the decoder, whatever its first token was."""
        return self.config.tokens.dec

    def image_context(self, images: Tensor) -> list[KeysValues]:
        """What the decoder's layers attend to: keys and values of each image."""
        return self.decoder.keys_values(self.encode_image(images))

    def empty_cache(self) -> list[KVCache]:
        """For a text that is generated token by token: one for each layer that `decode` runs."""
        return [KVCache() for _ in self.decoder.blocks]

    def decode(self, text: Text, context: Tensor | list, cache: list[KVCache] | None = None) -> Tensor:
        """Decoder tokens (B, L, D), each computed from the image and the tokens up to its own."""
        return self.decoder(text, context, cache=cache)

    def predict_next(self, batch: Batch, context: list[KeysValues]) -> tuple[Tensor, Tensor]:
        """What the loss compares: logits (N, V) and labels (N,) of all tokens of a batch's texts that are predicted.

        `context`: the decoder's `keys_values` of the batch's images.
        """

        def decoded(rows: Tensor | slice, text: Text) -> Tensor:
            image = gather_kv(context, rows)
            return self.decoder(text.with_first(self.start_token), image, rows=slice(0, text.length - 1))

        return self.predict_from(batch, decoded)

    def predict_from(self, batch: Batch, decoded: Callable[[Tensor | slice, Text], Tensor]) -> tuple[Tensor, Tensor]:
        """The same where `decoded(rows, text)` makes the decoder tokens of these rows' texts: (n, L-1, D)."""
        prefix = self.config.prefix_length if batch.prefix_length is None else batch.prefix_length
        labels = next_tokens(batch.text, prefix)  # (B, L-1)
        tokens = in_length_buckets(batch.text, decoded)  # (B, L-1, D), without columns of padding alone
        labels = labels[:, : tokens.shape[1]]
        predicted = labels != IGNORE
        return self.caption_head(tokens[predicted]), labels[predicted]

    def caption_logprob(self, images: Tensor, text: Text, prefix_length: Tensor | None = None) -> Tensor:
        """(B,) log-probability of each text as the caption of its image; ranks answers or captions.

        prefix_length: (B,) how many tokens of each text are given, such as a question; the rest is judged.
        """
        everyone = torch.arange(len(images), device=images.device)
        return self.caption_logprob_many(images, everyone, text, prefix_length)

    def caption_logprob_many(
        self, images: Tensor, image_rows: Tensor, text: Text, prefix_length: Tensor | None = None
    ) -> Tensor:
        """(R,) `caption_logprob` of text r and image `image_rows[r]`; each image is encoded once."""
        context = gather_kv(self.image_context(images), image_rows)
        hidden = self.decode(text.with_first(self.start_token), context)
        labels = next_tokens(text, self.config.prefix_length if prefix_length is None else prefix_length)
        return caption_logprob(self.caption_head(hidden[:, :-1]), labels)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        prompt: Tensor | None = None,
        decoding: DecodingConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Captions (B, L) as ids: the tokens, [SEP] and padding.

        `prompt`: ids without special tokens that all captions begin with, (n,), or each with its own, (B, n).
        `decoding`: greedy, beam search or sampling, and the length, at most the model's context; lengths count the
        start token, which is not returned, and [SEP]. `generator` draws when sampling.
        """
        tokens, rows, decoding = self.config.tokens, len(images), decoding or DecodingConfig()
        start = torch.full((rows, 1), self.start_token, device=images.device)
        if prompt is not None:
            start = torch.cat([start, prompt.to(start).expand(rows, -1)], dim=1)
        each = torch.arange(rows, device=images.device).repeat_interleave(decoding.beams)
        context = gather_kv(self.image_context(images), each)
        cache = self.empty_cache()

        def step(ids: Tensor, origin: Tensor | None) -> Tensor:
            if origin is not None:
                for layer in cache:
                    layer.gather(origin)
            text = Text(ids, torch.ones_like(ids, dtype=torch.bool))
            return self.caption_head(self.decode(text, context, cache)[:, -1])

        longest = self.config.text.context_length
        return generate(step, start, decoding, tokens.sep, tokens.pad, longest, generator)[:, 1:]
