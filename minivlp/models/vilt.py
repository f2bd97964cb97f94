"""ViLT: one transformer for both (Kim, Son and Kim, ICML 2021, "ViLT: Vision-and-Language Transformer Without
Convolution or Region Supervision").

    text  ──► word + position, LayerNorm ──► + "I am text" ──┐   [CLS] a red heart [SEP] │ class token, patches
                                                             ├─► one ViT, every token looks at every other
    image ──► patch projection + position ─► + "I am image" ─┘     │            │                 │
                                                                 [CLS]        words            patches
                                                                   ▼            ▼                 ▼
                                                           tanh ─► ITM         MLM     WPA: words move to patches

What was new: no tower at all. Most earlier models ran a detector over the picture before the transformer saw any of it;
here a patch is embedded by one matrix product, as cheaply as a word, and all the rest of the computation is spent on
both together. The price is that nothing can be computed ahead: there is no vector of a picture alone, so to search N
captions is to run N pairs (CLIP: one dot product each).

Code and paper: the pooled vector is read at the text's [CLS], not at the image's class token. The head of masked words
is not tied to the word embedding. Half of a batch's rows keep their image for ITM, the others get one drawn at random;
here never one of the same image or the same caption (`same_group`). MLM is a forward pass of its own: with words hidden
and a wrong image there would be nothing to find. Masking whole words keeps the text from giving its own words away.
Masked patch prediction is an ablation, which did not help as we remember the paper; the released code calls for a mask
token that it does not have. That code also shuffles the patches and drops some of large images: not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.attention import padding_mask
from minivlp.layers.block import BlockConfig
from minivlp.layers.embed import WordEmbed, resize_positions
from minivlp.layers.encoders import ImageConfig, ImageEncoder, TextConfig
from minivlp.layers.heads import WordHead
from minivlp.models.fused import precise, with_wrong
from minivlp.objectives.alignment import Alignment, inner_words, word_patch_alignment
from minivlp.objectives.contrastive import same_group
from minivlp.objectives.masking import (
    IGNORE,
    Masked,
    choose_tokens,
    choose_words,
    hide,
    maskable,
    masked_loss,
    word_groups,
)
from minivlp.objectives.matching import matching_loss, random_negatives


@dataclass(frozen=True)
class ViLTConfig:
    """Sizes, and which losses are on.

    image: the one transformer, a ViT with its patch projection. text: how words are embedded; it has no layers of its
    own (`layers` is 0), its block gives the eps of the LayerNorms outside the transformer.
    losses: any of itm, mlm, wpa, mpp. whole_words: hide all pieces of a word or none; False hides tokens.
    mask_rate: of words, and of patches for mpp. never_mask: ids that are not asked, the special tokens at least.
    """

    image: ImageConfig
    text: TextConfig
    losses: tuple[str, ...] = ("itm", "mlm", "wpa")
    whole_words: bool = True
    mask_rate: float = 0.15
    mask_id: int = 3
    never_mask: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> ViLTConfig:
        """1.2 M parameters, minutes on a laptop. Patches in two steps and fixed positions, as in all our nano models.

        The stem and the first blocks can start from a trained tower (`start_from`), as the paper starts from a ViT.
        """
        block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        words = BlockConfig(width=128, heads=4, hidden=512, norm_eps=1e-12)
        return cls(
            image=ImageConfig(64, 8, 4, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 56, 0, words, embed_norm=True, word_std=0.5, position_std=0.2),
        )

    @classmethod
    def small(cls, vocabulary: int = 30522) -> ViLTConfig:
        """About 45 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        words = BlockConfig(width=384, heads=6, hidden=1536, norm_eps=1e-12)
        return cls(
            image=ImageConfig(128, 8, 12, BlockConfig(384, 6, 1536), two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 64, 0, words, embed_norm=True, word_std=0.5, position_std=0.2),
        )

    @classmethod
    def paper(cls) -> ViLTConfig:
        """ViLT-B/32: a ViT-B/32 of 87.5 M parameters, 111.6 M with words and pooler, 135.7 M with the heads.

        The paper counts the first (87.4 M, as we remember its table).
        """
        words = BlockConfig(768, 12, 3072, norm_eps=1e-12)
        return cls(
            image=ImageConfig(384, 32, 12, BlockConfig(768, 12, 3072, norm_eps=1e-6)),
            text=TextConfig(30522, 40, 0, words, embed_norm=True, position_std=0.02),
            mask_id=103,
            never_mask=(0, 100, 101, 102, 103),
        )


class Picture(NamedTuple):
    """Image tokens as the transformer gets them."""

    tokens: Tensor  # (B, 1+P, D) class token first
    seen: Tensor  # (B, 1+P) bool, False on padding

    def take(self, rows: Tensor) -> Picture:
        """The pictures of these rows, which may repeat."""
        return Picture(self.tokens.index_select(0, rows), self.seen.index_select(0, rows))


class HiddenPatches(NamedTuple):
    """Which patches are asked, and which of these are hidden; the others stay as they are, (B, P) bool each."""

    asked: Tensor
    replaced: Tensor


class SingleStream(nn.Module):
    """Words and patches in one transformer. Subclasses add what is asked of its output.

    `images` is the number of pictures that one text can be about, each with a modality vector of its own.
    """

    def __init__(self, config: ViLTConfig, images: int = 1) -> None:
        super().__init__()
        self.config = config
        text, width = config.text, config.image.block.width
        if text.layers or text.block.width != width:
            raise ValueError(f"ViLT's text has no layers of its own and the transformer's width {width}, not {text}")
        norm_eps = text.block.norm_eps if text.embed_norm else None
        self.words = WordEmbed(text.vocabulary, text.context_length, width, text.word_std, text.position_std, norm_eps)
        self.joint = ImageEncoder(config.image)  # a plain ViT, which will see words among its patches
        self.modality = nn.Parameter(0.02 * torch.randn(1 + images, width))  # (1 + images, D), text first
        self.pool = nn.Linear(width, width)

    def cut(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> patches (B, D, rows, columns): all that is ever done to the image alone."""
        (height, width), patch = images.shape[-2:], self.config.image.patch_size
        if height % patch or width % patch:  # a convolution would silently cut the rest off
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {patch}")
        return self.joint.patches(images)

    def place(self, patches: Tensor, pixel_mask: Tensor | None = None, which: int = 1) -> Picture:
        """Give patches (B, D, rows, columns) their positions, a class token in front, and modality `which`.

        pixel_mask: (B, H, W), True on the image, which lies in the upper left corner, False on the padding of a batch
        of images of several shapes. Positions are those of each image's own grid.
        """
        count, _, rows, columns = patches.shape
        if pixel_mask is None:
            seen = torch.ones(count, rows * columns, dtype=torch.bool, device=patches.device)
            positions = self.positions_on(rows, columns)  # (P, D)
        else:
            step = self.config.image.patch_size
            seen = pixel_mask[:, ::step, ::step].bool()  # (B, rows, columns)
            sizes = zip(seen[:, :, 0].sum(1).tolist(), seen[:, 0].sum(1).tolist(), strict=True)
            positions = torch.stack(
                [
                    F.pad(self.positions_on(*size).unflatten(0, size), (0, 0, 0, columns - size[1], 0, rows - size[0]))
                    for size in sizes
                ]
            ).flatten(1, 2)  # (B, P, D)
            seen = seen.flatten(1)
        joint = self.joint
        first = joint.class_token if self.config.image.sincos_positions else joint.class_token + joint.class_position
        x = patches.flatten(2).transpose(1, 2) + positions  # (B, P, D)
        x = joint.norm_before(torch.cat([first.expand(count, 1, -1), x], dim=1))  # (B, 1+P, D)
        return Picture(x + self.modality[which], F.pad(seen, (1, 0), value=True))

    def positions_on(self, rows: int, columns: int) -> Tensor:
        """Patch positions (P, D) on this grid."""
        if self.config.image.sincos_positions:
            return self.joint.positions_for(rows, columns)
        grid = self.config.image.grid
        return resize_positions(self.joint.positions, (grid, grid), (rows, columns), "bilinear", align_corners=True)

    def embed_image(self, images: Tensor, pixel_mask: Tensor | None = None, which: int = 1) -> Picture:
        """images (B, 3, H, W) -> what the transformer sees of them; `pixel_mask` and `which` as in `place`."""
        return self.place(self.cut(images), pixel_mask, which)

    def look(self, picture: Picture, ids: Tensor, mask: Tensor) -> Tensor:
        """Run words and patches of equal rows together: ids, mask (B, L) -> (B, N, D), N = L + 1 + P, text first.

        Padding is hidden from all, but looks around itself: outputs there mean nothing.
        """
        x = torch.cat([self.words(ids) + self.modality[0], picture.tokens], dim=1)  # (B, N, D)
        allowed = padding_mask(torch.cat([mask, picture.seen], dim=1))
        for block in self.joint.blocks:
            x = block(x, allowed)
        return self.joint.norm(x)

    def pooled(self, fused: Tensor) -> Tensor:
        """The pair as one vector: (B, N, D) -> (B, D), from the text's [CLS]."""
        return self.pool(fused[:, 0]).tanh()

    def start_from(self, towers: nn.Module) -> None:
        """Copy patch projection, class token, positions, the first blocks and the words from a model with two towers.

        The paper starts from a ViT trained on labels. `towers` has an `ImageEncoder` as `image` and a `TextEncoder` as
        `text`, such as `XVLM`. Raises ValueError when sizes differ.
        """
        image, words = towers.image, towers.text.embed
        parts = {"joint.patches": image.patches, "words": words}
        parts |= {f"joint.blocks.{n}": block for n, block in enumerate(image.blocks[: len(self.joint.blocks)])}
        new = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        new |= {f"joint.{name}": t for name, t in image.named_parameters(recurse=False)}  # class token, positions
        own = self.state_dict()
        wrong = {n for n, t in new.items() if n not in own or own[n].shape != t.shape}
        wrong |= {n for n in own if n.startswith(("joint.patches", "joint.class", "joint.positions"))} - set(new)
        if wrong:
            raise ValueError(f"these towers have other sizes than {type(self).__name__}: {', '.join(sorted(wrong))}")
        self.load_state_dict(new, strict=False)


class ViLT(SingleStream):
    """Pre-training: does the text match, which word is hidden, where do the words go?"""

    Config = ViLTConfig
    lesson = "02"

    def __init__(self, config: ViLTConfig, continues: Tensor | None = None) -> None:
        """`continues` (V,) bool: which ids go on with the word before ("##ing"); None if every token is a word."""
        super().__init__(config)
        width, eps = config.image.block.width, config.text.block.norm_eps
        self.match_head = nn.Linear(width, 2)
        self.word_head = WordHead(width, config.text.vocabulary, eps)
        if "mpp" in config.losses:
            self.mask_token = nn.Parameter(torch.zeros(width))
            self.patch_head = WordHead(width, 3 * 256, eps)  # a "vocabulary" of 256 values for each of three colours
        none = torch.zeros(config.text.vocabulary, dtype=torch.bool)
        self.register_buffer("continues", none if continues is None else continues, persistent=False)

    def match(self, images: Tensor, ids: Tensor, mask: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(B,) probability that image and text of equal rows belong together."""
        return self.match_logits(self.look(self.embed_image(images, pixel_mask), ids, mask)).softmax(dim=-1)[:, 1]

    def fill(self, images: Tensor, ids: Tensor, mask: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """(B, L, V) logits of the word at every position; hide those that you ask for behind [MASK]."""
        return self.word_head(self.look(self.embed_image(images, pixel_mask), ids, mask)[:, : ids.shape[1]])

    def transport(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, P) how much of each word moves to each patch when the caption is laid over the picture: WPA's plan.

        A row of a word sums to 1 / number of words, rows of [CLS], [SEP] and padding to 0.
        """
        picture = self.embed_image(images)
        return self.alignment(self.look(picture, ids, mask), mask, picture.seen).plan

    def match_logits(self, fused: Tensor) -> Tensor:
        """(B, N, D) -> logits (B, 2), column 1 = they belong together."""
        return precise(self.match_head(self.pooled(fused)))

    def alignment(self, fused: Tensor, mask: Tensor, seen: Tensor, matched: Tensor | None = None) -> Alignment:
        """WPA of pairs (B, N, D): mask (B, L), seen (B, 1+P), matched (B,) bool, all of them if None.

        Words without [CLS] and [SEP] go to patches without the class token.
        """
        words, patches = precise(fused).split([mask.shape[1], seen.shape[1]], dim=1)
        matched = torch.ones_like(mask[:, 0]) if matched is None else matched
        return word_patch_alignment(words, patches[:, 1:], inner_words(mask), seen[:, 1:], matched)

    def losses(
        self,
        batch: Batch,
        paired: Tensor | None = None,
        masked: Masked | None = None,
        hidden: HiddenPatches | None = None,
    ) -> dict[str, Tensor]:
        """The losses of `config.losses`.

        `paired`, `masked` and `hidden` take the place of what `draw_images`, `hide_words` and `hide_patches` draw.
        False captions that the batch brings along are more wrong pairs for ITM, each with its own image; not for WPA,
        since most of their words do have their patch.
        """
        on, count = set(self.config.losses), len(batch.ids)
        picture, out = self.embed_image(batch.images), {}
        if on & {"itm", "wpa"}:
            paired = self.draw_images(batch) if paired is None else paired
            own = torch.arange(count, device=paired.device)
            ids, mask = with_wrong(batch) if "itm" in on else (batch.ids, batch.mask)
            right = F.pad(paired == own, (0, len(ids) - count))
            pairs = picture.take(torch.cat([paired, own])[: len(ids)])
            fused = self.look(pairs, ids, mask)
            if "itm" in on:
                logits = self.match_logits(fused)
                out["itm"] = matching_loss(logits[right], logits[~right])
            if "wpa" in on:
                out["wpa"] = self.alignment(fused[:count], mask[:count], pairs.seen[:count], right[:count]).loss
        if "mlm" in on:
            masked = masked or self.hide_words(batch.ids, batch.mask)
            asked = masked.labels[masked.labels != IGNORE]
            out["mlm"] = masked_loss(self.guess(picture, masked, batch.mask), asked)
        if "mpp" in on:
            hidden = hidden or self.hide_patches(picture.seen[:, 1:])
            out["mpp"] = masked_loss(*self.guess_patches(batch.images, batch.ids, batch.mask, hidden))
        return out

    def draw_images(self, batch: Batch) -> Tensor:
        """(B,) for each text the row of the image it is shown with: its own for half the rows, drawn for the others.

        A row that has no wrong partner in the batch keeps its own.
        """
        others = random_negatives(same_group(batch.image_ids, batch.ids, batch.mask)).image
        own = torch.arange(len(others), device=others.device)
        swap = torch.randperm(len(others), device=others.device) >= len(others) // 2
        return torch.where(swap & (others >= 0), others, own)

    def hide_words(self, ids: Tensor, mask: Tensor) -> Masked:
        """Put some words (or tokens) of each text (B, L) behind [MASK]; a short text may keep all of its words."""
        config = self.config
        candidates = maskable(ids, mask, config.never_mask)
        if config.whole_words:
            chosen = choose_words(candidates, word_groups(self.continues[ids]), config.mask_rate)
        else:
            chosen = choose_tokens(candidates, config.mask_rate)
        return hide(ids, chosen, config.mask_id, config.text.vocabulary)

    def guess(self, picture: Picture, masked: Masked, mask: Tensor) -> Tensor:
        """Logits (M, V) of the words that `masked` hides, in the order of their labels."""
        words = self.look(picture, masked.ids, mask)[:, : mask.shape[1]]
        return precise(self.word_head(words[masked.labels != IGNORE]))

    def hide_patches(self, seen: Tensor) -> HiddenPatches:
        """Ask for some of the patches `seen` (B, P), and hide four fifths of these."""
        asked = choose_tokens(seen, self.config.mask_rate)
        return HiddenPatches(asked, choose_tokens(asked, 0.8))

    def guess_patches(
        self, images: Tensor, ids: Tensor, mask: Tensor, hidden: HiddenPatches, pixel_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masked patch prediction: logits (M, 3, 256) and labels (M, 3), the patch's mean red, green and blue.

        M are the patches that `hidden` asks for and that are not padding. They are hidden before they get positions.
        """
        patches = self.cut(images)  # (B, D, rows, columns)
        replaced = hidden.replaced.unflatten(1, patches.shape[2:])[:, None]  # (B, 1, rows, columns)
        picture = self.place(torch.where(replaced, self.mask_token[:, None, None], patches), pixel_mask)
        asked = hidden.asked & picture.seen[:, 1:]
        fused = self.look(picture, ids, mask)[:, ids.shape[1] + 1 :]  # (B, P, D)
        colours = F.avg_pool2d(images / 2 + 0.5, self.config.image.patch_size)  # (B, 3, rows, columns), in 0..1
        labels = (255 * colours).long().flatten(2).transpose(1, 2)  # (B, P, 3)
        return precise(self.patch_head(fused[asked])).unflatten(-1, (3, 256)), labels[asked]


@dataclass(frozen=True)
class AnswersConfig(ViLTConfig):
    """How many answers there are to choose from, and how many images a text is about (VQA 3129, 1; NLVR2 2, 2)."""

    answers: int = 3129
    images_per_text: int = 1


class ViLTAnswers(SingleStream):
    """Fine-tuning: a question about one image (VQA), or a statement about two (NLVR2), answered from a list."""

    Config = AnswersConfig
    lesson = "02"

    def __init__(self, config: AnswersConfig) -> None:
        super().__init__(config, config.images_per_text)
        width = config.image.block.width
        self.answer_head = nn.Sequential(
            nn.Linear(config.images_per_text * width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, config.answers),
        )

    def answer(self, images: Tensor, ids: Tensor, mask: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Logits (B, answers). `images` (B, 3, H, W), or (B, images_per_text, 3, H, W), each run with the text."""
        views = images.unbind(1) if images.dim() == 5 else [images]
        pictures = [self.embed_image(view, pixel_mask, which) for which, view in enumerate(views, start=1)]
        pooled = [self.pooled(self.look(picture, ids, mask)) for picture in pictures]  # (B, D) each
        return precise(self.answer_head(torch.cat(pooled, dim=-1)))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """How far it is from the right answer, `batch.answers` (B,), to each of the `batch.ids`: about ln(answers) at
        first. Released code and paper sum a yes or no over all answers for VQA, where several are right; for NLVR2,
        where one is, they do as we do here.
        """
        return {"answer": F.cross_entropy(self.answer(batch.images, batch.ids, batch.mask), batch.answers)}


def joint_map(weights: Tensor, text_length: int) -> Tensor:
    """What the words see of the picture: text to patch, (B, L, P), cut out of a map over the whole sequence.

    weights: (B, N, N) as `rollout` or `grad_cam` give it, or one layer's (B, H, N, N), whose heads are averaged. What a
    word gives to other words and to the class token is left out, so rows sum to less than one.
    """
    rows = weights.detach().float()
    rows = rows.mean(dim=1) if rows.dim() == 4 else rows  # (B, N, N)
    return rows[:, :text_length, text_length + 1 :]
