"""What is asked of a model's tokens. Each head computes; `models.verbs` gives the verbs that come with it.

Axes: B batch, M image features, N text features, L tokens, D width, E joint-embedding width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Text


def to_float32(x: Tensor) -> Tensor:
    """At least float32, also under autocast: bfloat16 would round a coordinate to 1/256 of the image."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LogScale(nn.Module):
    """What cosines are multiplied with, learned as its logarithm so that it stays positive (CLIP, section 2.5).

    `at_most` bounds it after each step: CLIP's 100; None leaves it free (VLMo).
    """

    def __init__(self, temperature: float, at_most: float | None = 100.0, learned: bool = True) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)), learned)
        self.at_most = at_most

    def forward(self) -> Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the scale back into its range; called after each optimizer step."""
        if self.at_most is not None:
            self.log_scale.clamp_(max=math.log(self.at_most))


class Temperature(nn.Module):
    """What cosines are divided by, learned as it is and kept in .001 .. .5 (the released code of ALBEF and BLIP)."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self) -> Tensor:
        return 1 / self.temperature

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the temperature back into its range; called after each optimizer step."""
        self.temperature.clamp_(0.001, 0.5)


class ContrastiveHead(nn.Module):
    """One vector per image and per text, in a joint space: projection to E, unit length.

    `scale()` is what cosines are multiplied with.
    """

    def __init__(self, image_width: int, text_width: int, width: int, scale: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.project_image = nn.Linear(image_width, width, bias=bias)
        self.project_text = nn.Linear(text_width, width, bias=bias)
        self.scale = scale

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, 1+P, D), or the first of them (B, 1, D) -> unit vectors (B, E)."""
        return unit(self.project_image(tokens[:, 0]))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Text tokens (B, L, D), or the one to be read (B, 1, D) -> unit vectors (B, E)."""
        return unit(self.project_text(tokens[:, 0]))


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length one (..., E), in float32 also under autocast."""
    return F.normalize(to_float32(vectors), dim=-1)


class Pooler(nn.Module):
    """The first token as a summary of all, as in BERT: tokens (B, L, D) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dense(tokens[:, 0]).tanh()


class FirstToken(nn.Module):
    """The first token as it is: tokens (B, L, D) -> (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


class MatchingHead(nn.Module):
    """Do image and text belong together? Fused tokens (B, L, D) -> logits (B, 2), column 1 = they do."""

    def __init__(self, classifier: nn.Module, pooler: nn.Module | None = None) -> None:
        super().__init__()
        self.pooler = FirstToken() if pooler is None else pooler
        self.classifier = classifier

    def forward(self, tokens: Tensor) -> Tensor:
        return to_float32(self.classifier(self.pooler(tokens)))


class MaskedLMHead(nn.Module):
    """BERT's head: tokens (..., D) -> logits of the token at each place (..., V), masked or next.

    `tied`: a token embedding whose weights also are the output layer's.
    """

    def __init__(self, width: int, vocabulary: int, norm_eps: float, tied: nn.Embedding | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.decoder = nn.Linear(width, vocabulary)
        if tied is not None:
            self.decoder.weight = tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return to_float32(self.decoder(self.norm(F.gelu(self.dense(x)))))


class NextTokenHead(nn.Module):
    """One linear layer: tokens (..., D) -> logits of the token that follows each (..., V).

    `tied`: a token embedding whose weights also are this layer's; the bias, if there is one, is its own.
    """

    def __init__(self, width: int, vocabulary: int, tied: nn.Embedding | None = None, bias: bool = True) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, vocabulary, bias=bias)
        if tied is not None:
            self.decoder.weight = tied.weight
        if bias:
            nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        return to_float32(self.decoder(x))


class BoxHead(nn.Module):
    """Where is what the text names? Fused tokens (B, L, D) -> boxes (B, 4), cx, cy, w, h in 0..1 (X-VLM, 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = mlp(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return to_float32(self.mlp(tokens[:, 0])).sigmoid()


class AnswerHead(nn.Module):
    """Which answer of a list? Summaries (B, n D) of n passes -> logits (B, answers)."""

    def __init__(self, width: int, hidden: int, answers: int) -> None:
        super().__init__()
        self.mlp = mlp(width, answers, hidden)

    def forward(self, pooled: Tensor) -> Tensor:
        return to_float32(self.mlp(pooled))


def mlp(width: int, out: int, hidden: int | None = None) -> nn.Sequential:
    """The two-layer head of several papers: (..., D) -> (..., out)."""
    hidden = 2 * width if hidden is None else hidden
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


def last_token(text: Text) -> Tensor:
    """The place of each text's last real token, (B, 1): the only one of a causal tower that has read the whole text.

    The mask finds it, not its id: some tokenizers pad with the end-of-text token itself.
    """
    return text.mask.long().sum(dim=1, keepdim=True) - 1
