"""Search: images by text, texts by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import traitlets as T

from minivlp.data.pictures import Picture
from minivlp.inference import evaluating, tokenize_for
from minivlp.visualize.widgets.base import Widget, show_errors, source
from minivlp.visualize.widgets.pictures import data_url, pixels_of, png, thumbnail


class RetrievalBrowser(Widget):
    """Search among images by captions, and among captions by images, with the model's own similarities.

    Args:
        images: n pictures: PIL, paths, arrays; shown at 96 pixels. About fifty is a good number.
        captions: one text per image, or a list of texts per image.
        similarity: (n, m), higher means closer; m counts all captions in order.
        score_text: optional, text -> n similarities, for text that the reader types.
    """

    _esm = source("retrieval")
    thumbs = T.List(T.Unicode()).tag(sync=True)
    captions = T.List(T.Unicode()).tag(sync=True)
    owner = T.List(T.Int(), help="which image a caption belongs to").tag(sync=True)
    similarity = T.Bytes().tag(sync=True)
    asks = T.Bool().tag(sync=True)
    caption = T.Int(-1).tag(sync=True)
    image = T.Int(-1).tag(sync=True)
    question = T.Dict().tag(sync=True)
    answer = T.Dict(help="text, scores; or text, problem").tag(sync=True)

    def __init__(
        self,
        images: Sequence[Picture],
        captions: Sequence[str] | Sequence[Sequence[str]],
        similarity: np.ndarray | torch.Tensor,
        score_text: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        if len(captions) != len(images):
            raise ValueError(f"{len(images)} images but captions for {len(captions)}: give one entry per image")
        of_image = [[texts] if isinstance(texts, str) else list(texts) for texts in captions]
        texts = [text for group in of_image for text in group]
        owner = [i for i, group in enumerate(of_image) for _ in group]
        if isinstance(similarity, torch.Tensor):
            similarity = similarity.detach().float().cpu().numpy()
        self.table = np.ascontiguousarray(similarity, dtype=np.float32)  # (n, m)
        if self.table.shape != (len(images), len(texts)) or not texts:
            raise ValueError(
                f"similarity has shape {self.table.shape}; {len(images)} images and {len(texts)} captions ask for "
                f"({len(images)}, {len(texts)}), at least one of each"
            )
        if not np.isfinite(self.table).all():
            raise ValueError("similarity holds numbers that are not finite")
        self.score_text = score_text
        self.small = [thumbnail(image) for image in images]
        super().__init__(
            thumbs=[data_url(small, "JPEG") for small in self.small],
            captions=texts,
            owner=owner,
            similarity=self.table.tobytes(),
            asks=score_text is not None,
        )
        self.observe(self._on_question, "question")

    @classmethod
    def of(
        cls, model: torch.nn.Module, images: Sequence[Picture], captions: Sequence[Any], tokenizer: Any
    ) -> RetrievalBrowser:
        """Use `model.similarity`, for the captions given and for any the reader types.

        Raises TypeError when the model has no `similarity` (ViLT has none).
        """
        if not hasattr(model, "similarity"):
            raise TypeError(f"{type(model).__name__} has no `similarity`: fill a table with `match` and pass that")
        texts = [text for group in captions for text in ([group] if isinstance(group, str) else group)]
        pixels = pixels_of(model, images)

        def score(some: Sequence[str]) -> torch.Tensor:
            with evaluating(model):
                return model.similarity(pixels, tokenize_for(model, tokenizer, some)).float().cpu()  # (n, m)

        return cls(images, captions, score(texts), lambda text: score([text])[:, 0].tolist())

    def search(self, text: str) -> list[int]:
        """Rank the images for any text, as typing it does; returns their indices, best first."""
        if self.score_text is None:
            raise TypeError("this RetrievalBrowser has no `score_text` function to ask")
        scores = [float(score) for score in self.score_text(text)]
        self.caption = self.image = -1
        self.answer = {"text": text, "scores": scores}
        return list(map(int, np.argsort(scores)[::-1]))

    def _on_question(self, change: Any) -> None:
        question = change["new"]
        if "text" in question:
            with show_errors(self, "answer", question):
                self.search(question["text"])

    def __repr__(self) -> str:
        return f"RetrievalBrowser({len(self.thumbs)} images, {len(self.captions)} captions)"

    def to_png(self) -> bytes:
        from minivlp.visualize.drawing import retrieval_grid

        some = np.unique(np.linspace(0, len(self.captions) - 1, 4).astype(int))
        images = [np.asarray(small) for small in self.small]
        right = [self.owner[i] for i in some]
        return png(retrieval_grid([self.captions[i] for i in some], images, self.table[:, some], right, top=6))
