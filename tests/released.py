"""Golden runs of released models in our classes: their weights go through the tables of `minivlp.pretrained`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.vlmo import VLMoConfig
from minivlp.objectives.masking import IGNORE, MaskedTokens
from minivlp.objectives.matching import Negatives
from minivlp.papers import PAPERS
from minivlp.pretrained.keys import Release, translate
from minivlp.training.checkpoint import set_weights, weights

State = dict[str, Tensor]


def release_for(family: str, state: State) -> Release:
    """The release of this family that a checkpoint with these names is."""
    releases = PAPERS[family].release_list()
    return next(r for r in releases if any(name.startswith(r.key_prefix) for name in state))


def model_of(config: Any) -> nn.Module:
    """A model of any paper from its config, with random weights."""
    kinds = (kind for paper in PAPERS.values() for kind in paper.related_classes())
    return next(kind for kind in kinds if kind.Config is type(config))(config)


def four_heads(config: Any) -> Any:
    """The golden models have four heads; no released one is as narrow, so this cannot be derived from their tensors."""
    block = replace(config.image.block, heads=4)
    text = replace(config.text, block=replace(config.text.block, heads=4))
    return replace(config, image=replace(config.image, block=block), text=text)


def released_model(family: str, state: State, config: Any) -> nn.Module:
    """Our model with the weights of a released one; parts that the release lacks stay as they are initialized.

    With `config.momentum`, the momentum model gets the release's, and the queue its queue. Nothing in the queue is a
    positive of any row.
    """
    release = release_for(family, state)
    found, _ = translate(release, state, without_momentum(config), "the golden file")
    model = model_of(config).eval()
    set_weights(model, weights(model) | found, "the golden file")
    if getattr(config, "momentum", None) is not None:
        momentum, size = model.momentum_model.model, config.momentum.queue_size
        found, _ = translate(release, momentum_names(state), momentum, "the golden file")
        set_weights(momentum, found, "the golden file")
        queue = model.queue
        queue.images.copy_(state["image_queue"].T)
        queue.texts.copy_(state["text_queue"].T)
        queue.ids.copy_(-1 - torch.arange(2 * size).view(size, 2))
        queue.count.fill_(size + int(state["queue_ptr"]))
        model.momentum_model.updates.fill_(7)
    return model


def load_by_table(model: nn.Module, table: tuple, state: State, optional: tuple[str, ...] = ()) -> None:
    """Give a model, or a part such as an encoder, the weights of another library's, by a table of names.

    Parts whose names begin with one of `optional` may keep their weights.
    """
    settings = {"config": None, "processor": "", "processor_settings": None, "tokenizer": ""}
    release = Release("", table, **settings, ignored=("*",), optional=optional)
    found, _ = translate(release, state, model, "the reference")
    set_weights(model, weights(model) | found, "the reference")


def tied_to(state: State, name: str) -> list[str]:
    """All names of a weight."""
    return [other for other, tensor in state.items() if tensor is state[name]]


def places_of(release: Release, state: State, model: nn.Module, theirs: str) -> State:
    """Which of our weights one of theirs is, or is a part of: our name -> bool of its shape, True there."""
    shifted = state | dict.fromkeys(tied_to(state, theirs), state[theirs] + 1)
    before, after = (translate(release, tensors, model, "")[0] for tensors in (state, shifted))
    return {own: after[own] != before[own] for own in before if not torch.equal(after[own], before[own])}


def without_momentum(config: Any) -> nn.Module:
    """The same model without momentum model and queue, as far as it has them."""
    return model_of(replace(config, momentum=None) if hasattr(config, "momentum") else config)


def momentum_names(state: State) -> State:
    """The weights of the momentum model, by the names of the model: `vision_proj_m.bias` -> `vision_proj.bias`."""
    return {name.replace("_m.", ".", 1): value for name, value in state.items() if "_m." in name}


class Comparison:
    """Compares values with the outputs of a golden run by name, and remembers which were compared."""

    def __init__(self, golden: Any) -> None:
        self.golden, self.done = golden, set()

    def __call__(self, name: str, value: Tensor) -> None:
        """Raises AssertionError where shape or value differ."""
        expected = self.golden.outputs[name]
        assert value.shape == expected.shape, f"{name}: {tuple(value.shape)}, expected {tuple(expected.shape)}"
        difference = (value.detach().double() - expected.double()).abs().max()
        assert difference <= self.golden.tolerance, f"{name} differs by {difference:.1e}"
        self.done.add(name)

    def gradients(
        self, family: str, model: nn.Module, before: str = "grad.", after: str = "", state: State | None = None
    ) -> None:
        """The gradients that the golden run has, named like its weights, between `before` and `after`.

        state: the weights that the model was loaded from, if not all of the golden file.
        """
        names = [n for n in self.golden.outputs if n.startswith(before) and n.endswith(after)]
        assert names
        gradients = their_gradients(family, self.golden.state if state is None else state, model)
        for name in names:
            self(name, gradients[name.removeprefix(before).removesuffix(after)])

    def momentum_weights(self, family: str, model: nn.Module) -> None:
        """The weights of the momentum model after a step, `ema.` and their name."""
        release, momentum = release_for(family, self.golden.state), model.momentum_model.model
        start, ours = momentum_names(self.golden.state), weights(momentum)
        for name in [n for n in self.golden.outputs if n.startswith("ema.")]:
            theirs = name.removeprefix("ema.").replace("_m.", ".", 1)
            ((own, place),) = places_of(release, start, momentum, theirs).items()
            stepped = start | dict.fromkeys(tied_to(start, theirs), self.golden.outputs[name].view_as(start[theirs]))
            expected = translate(release, stepped, momentum, "")[0][own]
            assert (ours[own] - expected)[place].abs().max() <= self.golden.tolerance, name
            self.done.add(name)


def their_gradients(family: str, state: State, model: nn.Module) -> State:
    """The gradients of our model, after a backward pass, by the names of the release's weights.

    Our weights are a function of theirs, the release's table; the chain rule does the rest.
    """
    leaves = {id(t): t.clone().requires_grad_() for t in state.values() if t.is_floating_point()}
    theirs = {name: leaves.get(id(t), t) for name, t in state.items()}  # tied weights are one leaf
    found, _ = translate(release_for(family, state), theirs, without_momentum(model.config), "the golden file")
    ours = dict(model.named_parameters())
    total = sum((made * ours[name].grad).sum() for name, made in found.items() if ours[name].grad is not None)
    found_gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    by_leaf = {
        i: torch.zeros_like(leaf) if g is None else g
        for (i, leaf), g in zip(leaves.items(), found_gradients, strict=True)
    }
    return {name: by_leaf[id(t)] for name, t in state.items() if t.is_floating_point()}


def golden_text(inputs: State, ids: str = "input_ids") -> Text:
    """The texts of a golden run."""
    return Text(inputs[ids], inputs["attention_mask"].bool())


def golden_negatives(inputs: State) -> Negatives:
    """The negatives that a golden run drew."""
    return Negatives(inputs["itm_neg_image_for_text"], inputs["itm_neg_text_for_image"])


def golden_masked(inputs: State) -> MaskedTokens:
    """The masked texts of a golden run, and their labels (B, L), in both forms in which the files have them."""
    text, labels = golden_text(inputs, "mlm_input_ids"), inputs["mlm_labels"]
    if "mlm_pos" in inputs:  # labels (B, M) of the places `mlm_pos`, padded
        row, place = (labels != IGNORE).nonzero(as_tuple=True)
        labels = torch.full_like(text.ids, IGNORE)
        labels[row, inputs["mlm_pos"][row, place]] = inputs["mlm_labels"][row, place]
    return MaskedTokens(text, labels)


def golden_vlmo_config(numbers: dict[str, Any]) -> VLMoConfig:
    """The sizes of a golden VLMo, whose texts are shorter than the released ones'."""
    width, layers = numbers["width"], numbers["layers"]
    block = BlockConfig(width, numbers["heads"], numbers["mlp_ratio"] * width, norm_eps=1e-6, layer_scale=0.1)
    longest = numbers["max_text_len_of_initckpt"]
    return VLMoConfig(
        ImageConfig(numbers["image_size"], numbers["patch_size"], layers, block, relative_positions=True),
        TextConfig(numbers["vocab"], longest, layers, block, embed_norm=True, position_std=None),
        vl_from=layers if numbers["stage2_textmlm"] else numbers["vlffn_start"],
        embed_width=width,
    )
