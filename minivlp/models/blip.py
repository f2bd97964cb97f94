"""BLIP: one text model that reads, judges and writes (Li et al., ICML 2022, "Bootstrapping Language-Image Pre-training
for Unified Vision-Language Understanding and Generation").

                       [CLS] text ──► reads text alone ───────────────► ITC: who belongs to whom?
                                          │ the same layers
    image ──► image tower ──┬──► [ENC] text ──► looks at patches ─────► ITM: does this text belong to this image?
                            │             │ the same, but for self-attention
                            └──► [DEC] text ──► looks at patches, ────► LM: what is the next word?
                                                never ahead

What was new: (1) the three share their weights ("MED", a mixture of encoder and decoder): word embeddings,
cross-attention and feed-forward serve all, only self-attention is the decoder's own, since reading and writing need
different ones; (2) a model that can judge and write can mend its own training data. Pre-trained on captions from the
web, many of which do not say what is shown, it is fine-tuned on few good ones: as a captioner, which writes a new
caption for each image, and as a filter, which throws out those that do not match, old or new (`training.capfilt`).

Code and paper: [ENC] or [DEC] takes the place of [CLS], and words look at patches in *every* layer, where ALBEF has six
layers for reading first. So ITM and LM read the text anew, three passes in all; the image is encoded once, and with
shared cross-attention its keys and values are computed once for both. Labels are smoothed by 0.1. The teacher is
ALBEF's (so are our differences from its code), has a say in ITC only, and needs neither decoder nor heads. To answer
questions, the paper reads the question with [ENC], and a decoder of its own then looks at that instead of the image;
here the decoder reads the question as the beginning of its text and goes on with the answer, as GIT does (Wang et al.
2022): `data.questions`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.attention import KeysValues, Past
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig, TextEncoder
from minivlp.layers.generate import Rules, generate
from minivlp.layers.heads import WordHead
from minivlp.layers.timm_tower import image_tower
from minivlp.models.fused import precise, take, with_wrong
from minivlp.models.taught import TaughtTowers
from minivlp.objectives.captioning import caption_logprob, caption_loss, next_words
from minivlp.objectives.contrastive import same_group
from minivlp.objectives.masking import IGNORE
from minivlp.objectives.matching import Negatives, hard_negatives, random_negatives

SELF_ATTENTION = ("self_attention", "self_norm", "norm")
CROSS_ATTENTION = ("cross_attention", "cross_norm")
THE_REST = ("embed", "feed_forward", "feed_norm")


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes, what encoder and decoder share, and which losses are on.

    shared: names of the parts that encoder and decoder have in common, of the whole stack (embed, norm) or in each of
    its layers. The paper's other choices are `()` and `SELF_ATTENTION + CROSS_ATTENTION + THE_REST`, or all but
    `CROSS_ATTENTION`. tie_words: the next word is read off with the word embedding itself.
    losses: any of itc, itm, lm; a captioner is fine-tuned with lm alone, a filter with the other two. prompt: how many
    tokens at the start of each caption are given, not asked; more than [DEC] where all captions begin alike.
    decode_id, match_id: [DEC] and [ENC]; stop_id: [SEP]; these and pad_id are our tokenizer's.
    momentum, alpha, alpha_steps, queue_size: the teacher, as in `ALBEFConfig`; momentum None is none.
    """

    image: ImageConfig
    text: TextConfig
    embed_width: int
    shared: tuple[str, ...] = CROSS_ATTENTION + THE_REST
    tie_words: bool = True
    losses: tuple[str, ...] = ("itc", "itm", "lm")
    temperature: float = 0.07
    smoothing: float = 0.1
    prompt: int = 1
    pad_id: int = 0
    stop_id: int = 2
    decode_id: int = 5
    match_id: int = 6
    momentum: float | None = 0.995
    alpha: float = 0.4
    alpha_steps: int = 10_000
    queue_size: int = 57_600

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> BLIPConfig:
        """1.6 M parameters, minutes on a laptop. Sizes and choices are those of X-VLM's nano, so its towers fit.

        No teacher: it needs time, and a run of minutes has little.
        """
        block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        return cls(
            image=ImageConfig(64, 8, 3, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 56, 2, block, word_std=0.5, position_std=0.2),
            embed_width=64,
            tie_words=False,
            momentum=None,
            alpha_steps=400,
            queue_size=1024,
        )

    @classmethod
    def small(cls, vocabulary: int = 30522) -> BLIPConfig:
        """About 56 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        block = BlockConfig(width=384, heads=6, hidden=1536)
        return cls(
            image=ImageConfig(128, 8, 8, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 64, 6, block, word_std=0.5, position_std=0.2),
            embed_width=256,
            tie_words=False,
            alpha_steps=2000,
            queue_size=8192,
        )

    @classmethod
    def paper(cls) -> BLIPConfig:
        """ViT-B/16 at 224 pixels and BERT-base with [DEC] and [ENC] added to its words: 251 M parameters, heads apart.

        `alpha_steps` is about two epochs of the paper's 14 M images in batches of 2880.
        """
        text_block = BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)
        return cls(
            image=ImageConfig(224, 16, 12, BlockConfig(768, 12, 3072, norm_eps=1e-6)),
            text=TextConfig(30524, 512, 12, text_block, embed_norm=True, position_std=0.02),
            embed_width=256,
            stop_id=102,
            decode_id=30522,
            match_id=30523,
        )


class BLIP(TaughtTowers):
    """Reads texts, judges whether they fit an image, and writes them."""

    Config = BLIPConfig
    lesson = "05"

    def __init__(self, config: BLIPConfig) -> None:
        width, image_width = config.text.block.width, config.image.block.width
        text = TextEncoder(config.text, image_width)
        decoder = TextEncoder(replace(config.text, causal=True), image_width)
        share(config.shared, text, decoder)
        super().__init__(config, image_tower(config.image), text, nn.Linear(width, 2), decoder=decoder)
        tied = decoder.embed.words if config.tie_words else None
        self.word_head = WordHead(width, config.text.vocabulary, config.text.block.norm_eps, tied)
        self.find_teacher(without=("temperature", "match_head", "decoder", "word_head"))

    def fuse(self, ids: Tensor, mask: Tensor, visual: Tensor | list[KeysValues], seen: Tensor | None = None) -> Tensor:
        """Texts (B, L) read while looking at image tokens (B, 1+P, D) or their `text.keys_values`: (B, L, D)."""
        return self.text(begin(ids, self.config.match_id), mask, visual, context_mask=seen)

    def look(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text tokens (B, L, D) that have looked at the image of their row; the first sums up how they fit."""
        return self.fuse(ids, mask, self.encode_image(images))

    def look_many(self, images: Tensor, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text tokens (R, L, D) that have looked at image rows[r]; each of the images (B, 3, H, W) is encoded once."""
        return self.fuse(ids, mask, take(self.text.keys_values(self.encode_image(images)), rows))

    def tell(self, ids: Tensor, visual: Tensor | list[KeysValues], past: list[Past] | None = None) -> Tensor:
        """Decoder tokens (B, L, D), each of which has seen the image and the words up to its own."""
        return self.decoder(ids, None, visual, past=past)

    def losses(self, batch: Batch, negatives: Negatives | None = None) -> dict[str, Tensor]:
        """The losses of `config.losses`. In training ITC also moves the teacher and fills the queue.

        False captions that the batch brings along are more wrong pairs for ITM. Without ITC its wrong pairs are drawn
        evenly. `negatives` take the place of those that are drawn.
        """
        config, on = self.config, set(self.config.losses)
        visual = self.encode_image(batch.images)
        out = {}
        if "itc" in on:
            taught, alpha = self.ask_teacher(batch.images, visual)
            words = self.encode_text(batch.ids, batch.mask)
            out["itc"], likeness = self.contrast(batch, visual, words, taught, alpha)
        if on & {"itm", "lm"}:
            keys_values = self.text.keys_values(visual)  # once for all the texts that will look at it
        if "itm" in on:
            together = same_group(batch.image_ids, batch.ids, batch.mask)
            if negatives is None and "itc" in on:
                negatives = hard_negatives(likeness[0], together, floor=1e-4, back=likeness[1])
            out["itm"] = self.matching(*with_wrong(batch), keys_values, negatives or random_negatives(together))
        if "lm" in on:
            both = "cross_attention" in config.shared
            told = self.tell(begin(batch.ids, config.decode_id), keys_values if both else visual)
            prompt = config.prompt if batch.given is None else batch.given
            labels = next_words(batch.ids, batch.mask, prompt)  # (B, L-1)
            asked = labels != IGNORE
            logits = precise(self.word_head(told[:, :-1][asked]))  # (M, V)
            out["lm"] = caption_loss(logits, labels[asked], config.smoothing)
        return out

    def caption_logprob(self, images: Tensor, ids: Tensor, mask: Tensor, given: Tensor | None = None) -> Tensor:
        """(B,) log-probability of each text as the caption of its image; what ranks answers or captions.

        given: (B,) how many tokens of each text are there already, such as a question; the rest is what is judged.
        """
        everyone = torch.arange(len(images), device=images.device)
        return self.caption_logprob_many(images, everyone, ids, mask, given)

    def caption_logprob_many(
        self, images: Tensor, rows: Tensor, ids: Tensor, mask: Tensor, given: Tensor | None = None
    ) -> Tensor:
        """(R,) `caption_logprob` of text r and image rows[r]; many texts of one image encode it once."""
        visual = take(self.decoder.keys_values(self.encode_image(images)), rows)
        told = self.tell(begin(ids, self.config.decode_id), visual)
        labels = next_words(ids, mask, self.config.prompt if given is None else given)
        return caption_logprob(precise(self.word_head(told[:, :-1])), labels)

    def start_from(self, towers: nn.Module) -> None:
        """Begin with trained towers, as the paper begins with a ViT and BERT: the decoder reads as the encoder does.

        `towers` is like `XVLM`. Where its fusion layers look at patches is where ours begin to, layer by layer. Raises
        ValueError when sizes differ.
        """
        parts = {"image": towers.image, "project_image": towers.project_image, "project_text": towers.project_text}
        for stack in ("text", "decoder"):
            parts |= {f"{stack}.embed": towers.text.embed, f"{stack}.norm": towers.text.norm}
            for layer, (read, look) in enumerate(zip(towers.text.blocks, towers.fusion.blocks, strict=True)):
                block = dict(read.named_children()) | {name: getattr(look, name) for name in CROSS_ATTENTION}
                parts |= {f"{stack}.blocks.{layer}.{name}": part for name, part in block.items()}
        new = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        own, new["temperature"] = self.state_dict(), towers.temperature
        wrong = [name for name, t in new.items() if name not in own or own[name].shape != t.shape]
        if wrong:
            raise ValueError(f"these towers have other sizes than BLIP: {', '.join(wrong)}")
        self.load_state_dict(new, strict=False)
        if self.teacher is not None:  # it begins as its student
            self.teacher.copy_from(self)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        prompt: Tensor | None = None,
        *,
        beams: int = 1,
        top_p: float | None = None,
        max_length: int | None = None,
        min_length: int = 0,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Captions (B, L) as ids: the words, [SEP] and padding.

        `prompt`: words, without special tokens, that all captions begin with, (n,), or each with its own, (B, n). See
        `layers.generate` for the rest; lengths count [DEC], which is not returned, and [SEP], and are at most the
        model's context. The paper writes with 3 beams and 5 to 20 tokens, its captioner for CapFilt with `top_p` .9.
        """
        config, rows = self.config, len(images)
        start = torch.full((rows, 1), config.decode_id, device=images.device)
        if prompt is not None:
            start = torch.cat([start, prompt.to(start).expand(rows, -1)], dim=1)
        each = torch.arange(rows, device=images.device).repeat_interleave(beams)
        visual = take(self.decoder.keys_values(self.encode_image(images)), each)
        past = [Past() for _ in self.decoder.blocks]

        def step(ids: Tensor, origin: Tensor | None) -> Tensor:
            if origin is not None:
                for memory in past:
                    memory.take(origin)
            return precise(self.word_head(self.tell(ids, visual, past)[:, -1]))

        longest = min(max_length or config.text.context_length, config.text.context_length)
        rules = Rules(config.stop_id, config.pad_id, longest, min_length, repetition_penalty)
        written = generate(
            step, start, rules, beams=beams, length_penalty=length_penalty, top_p=top_p, generator=generator
        )
        return written[:, 1:]


def share(parts: tuple[str, ...], text: TextEncoder, decoder: TextEncoder) -> None:
    """Make these parts of the decoder, in the stack and in each of its blocks, the very modules of the text encoder."""
    for name in parts:
        both = [
            (a, b) for a, b in zip([text, *text.blocks], [decoder, *decoder.blocks], strict=True) if hasattr(a, name)
        ]
        if not both:
            raise ValueError(f"encoder and decoder have no {name!r} to share")
        for ours, theirs in both:
            setattr(theirs, name, getattr(ours, name))


def begin(ids: Tensor, first: int) -> Tensor:
    """The texts (B, L) with another token in place of [CLS]: it says what is to be done with them."""
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, 1:]], dim=1)
