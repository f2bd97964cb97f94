"""Lesson 03's larger exercises: right modules and steps pass, typical wrong ones are told what failed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.layers.transformer import Block
from minivlp.lessons.albef_parts import CONSTANT_ANSWER, check_cross_attention, check_step, short_run
from minivlp.lessons.check import NotYet
from minivlp.models.albef import ALBEF
from minivlp.papers import paper
from minivlp.training.recipes import Recipe


def attention(**mistakes):
    """The class of the exercise, with mistakes: name -> True."""
    wrong = mistakes.get

    class Mine(nn.Module):
        def __init__(self, width, heads, context_width):
            super().__init__()
            self.heads = heads
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(context_width, 2 * width)
            self.out = nn.Linear(width, width)

        def forward(self, x, context, mask=None):
            q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)
            if wrong("swapped"):
                k, v = v, k
            heads = 1 if wrong("one_head") else self.heads
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
            if wrong("detached"):
                k = k.detach()
            width = 1 if wrong("unscaled") else x.shape[-1] if wrong("whole_width") else x.shape[-1] // self.heads
            scores = q @ k.transpose(-2, -1) / width**0.5
            if mask is not None and not wrong("no_mask"):
                scores = scores.masked_fill(mask if wrong("inverted") else ~mask, -torch.inf)
            weights = scores.softmax(dim=-2 if wrong("queries") else -1)
            if wrong("masked_late") and mask is not None:
                weights = (q @ k.transpose(-2, -1) / width**0.5).softmax(dim=-1) * mask
            mixed = weights @ v
            mixed = mixed.reshape(x.shape) if wrong("joined") else mixed.transpose(1, 2).flatten(2)
            return mixed if wrong("no_out") else self.out(mixed) + (x if wrong("residual") else 0)

    return Mine


def in_place(*sizes):
    """Right, though it writes into its arguments."""

    class Mine(attention()):
        def forward(self, x, context, mask=None):
            answer = super().forward(x.clone(), context.clone(), mask)
            if not (x.requires_grad or context.requires_grad):
                x.zero_(), context.zero_()
            return answer

    return Mine(*sizes)


def test_a_right_cross_attention_passes(capsys):
    check_cross_attention(attention())
    check_cross_attention(in_place)
    assert capsys.readouterr().out.count("ok") == 2


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("swapped", "swapped"),
        ("one_head", "heads are not separated"),
        ("detached", "is another one"),
        ("unscaled", "not scaled"),
        ("whole_width", "width of one head"),
        ("no_mask", "no effect"),
        ("inverted", "wrong way round"),
        ("queries", "over the queries"),
        ("masked_late", "wrong with one"),
        ("joined", "beside the tokens"),
        ("no_out", "`out`"),
        ("residual", "residual"),
    ],
)
def test_a_wrong_cross_attention_is_told_what_failed(mistake, message):
    with pytest.raises(NotYet, match=message):
        check_cross_attention(attention(**{mistake: True}))


def test_other_layers_are_refused():
    with pytest.raises(NotYet, match="Keep the three linear layers"):
        check_cross_attention(lambda width, heads, context: nn.Linear(width, width))


def stub(*arguments):
    raise NotImplementedError("your turn")


def step(**mistakes):  # noqa: C901 - one branch per mistake
    """The training step of the exercise, with mistakes: name -> True."""
    wrong = mistakes.get

    @torch.no_grad()
    def follow(momentum, model, m):
        for old, new in zip(momentum.parameters(), model.parameters(), strict=True):
            old.lerp_(new, m if wrong("shares") else 1 - m)

    def mine(model, momentum, queue, batch, optimizer, draw, m):
        text, count = batch.text, len(batch.text)
        rows = torch.arange(count)
        if not wrong("no_momentum") and not wrong("late"):
            follow(momentum, model, m)
        with torch.no_grad():
            slow = momentum.embed_images(batch.images), momentum.embed_texts(text)
        image_tokens, text_tokens = model.encode_image(batch.images), model.encode_text(text)
        own = model.itc_head.embed_image(image_tokens), model.itc_head.embed_text(text_tokens)
        ids = torch.stack([batch.image_ids, batch.image_ids + 1000], 1) if wrong("ids") else pair_ids_of(batch)
        if wrong("early_queue"):
            queue.put(*slow, ids)
        past = [part[:0] if wrong("no_queue") else part.clone() for part in queue.features()]
        positives = queue.positives(ids)[:, : count + len(past[0])]
        others = own if wrong("itself") else slow
        scale = model.itc_head.scale()
        logits = [scale * own[i] @ torch.cat([others[1 - i], past[1 - i]]).T for i in (0, 1)]
        targets = positives / positives.sum(1, keepdim=True)
        if wrong("own_pair"):
            targets = rows
        itc = sum(F.cross_entropy(one, targets) for one in logits) / (1 if wrong("both") else 2)
        if wrong("detached_itc"):
            itc = itc.detach().requires_grad_()
        block = slice(None) if wrong("whole_row") else slice(count)
        weights = [one[:, block].detach().softmax(1) for one in logits]
        if wrong("raw"):
            weights = [one[:, :count].detach() for one in logits]
        if wrong("even"):
            weights = [torch.ones(count, count) for _ in logits]
        if not wrong("own_drawn"):
            weights = [one.masked_fill(positives[:, block], 0) for one in weights]
        if wrong("same_weights"):
            weights = [weights[0], weights[0]]
        text_of = draw(weights[0])
        image_of = text_of if wrong("texts_only") else draw(weights[1])
        image_rows, text_rows = torch.cat([rows, image_of, rows]), torch.cat([rows, rows, text_of])
        if wrong("mixed_up"):
            image_rows = torch.cat([rows, rows, image_of])
        if wrong("two_b"):
            image_rows, text_rows = torch.cat([rows, rows]), torch.cat([rows, text_of])
        tokens = text_tokens.detach() if wrong("cut") else text_tokens
        fused = model.fuse(tokens[text_rows], text.mask[text_rows], image_tokens[image_rows])
        labels = (torch.arange(len(text_rows)) < count).long()
        labels = 1 - labels if wrong("inverted") else labels
        itm = F.cross_entropy(model.match_head(fused), labels, reduction="sum" if wrong("sum") else "mean")
        if not wrong("no_zero"):
            optimizer.zero_grad()
        loss = itc if wrong("itc_only") else itc + itm
        if not wrong("no_backward"):
            loss.backward()
        if not wrong("no_step"):
            optimizer.step()
        if wrong("late"):
            follow(momentum, model, m)
        if not wrong("no_put") and not wrong("early_queue"):
            queue.put(*(reversed(slow) if wrong("swapped") else own if wrong("own_queue") else slow), ids)
        return itc.item(), itm.item()

    return mine


def pair_ids_of(batch):
    from minivlp.objectives.momentum import pair_ids

    return pair_ids(batch.image_ids, batch.text)


def test_a_right_step_passes(capsys):
    check_step(step())
    assert capsys.readouterr().out.startswith("ok")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no_momentum", "did not change: update it before"),
        ("late", "after the optimizer's step|did not change"),
        ("shares", "shares are swapped"),
        ("texts_only", "called 1 times"),
        ("two_b", "your matching head saw 10"),
        ("whole_row", "The weights are those of the batch"),
        ("raw", "apply the softmax"),
        ("even", "over the batch; yours are others|same weights twice"),
        ("own_drawn", "positive can be drawn"),
        ("ids", "positive can be drawn"),
        ("same_weights", "same weights twice"),
        ("no_queue", "batch alone"),
        ("itself", "weights are the softmax"),
        ("own_pair", "share the target"),
        ("both", "take their mean"),
        ("early_queue", "in the queue already"),
        ("inverted", "labels are inverted"),
        ("sum", "take their mean"),
        ("mixed_up", "Pair caption b"),
        ("no_zero", "zero_grad"),
        ("no_backward", "old gradients|did not change"),
        ("no_step", r"optimizer.step\(\)"),
        ("itc_only", "Only ITC trains"),
        ("detached_itc", "Only ITM trains"),
        ("cut", "part of the loss is detached"),
        ("no_put", "queue.put"),
        ("own_queue", "put the model's own there"),
        ("swapped", "Images and texts are swapped"),
    ],
)
def test_a_wrong_step_is_told_what_failed(mistake, message):
    with pytest.raises(NotYet, match=message):
        check_step(step(**{mistake: True}))


def test_unwritten_and_without_numbers():
    with pytest.raises(NotYet, match="Nothing written yet"):
        check_step(stub)
    with pytest.raises(NotYet, match="two numbers"):
        check_step(lambda *arguments: torch.zeros(3))


def test_the_short_run_learns_with_a_right_step_and_not_without_an_update():
    """From the bundled towers, with the student's cross-attention in the fusion layers."""
    tokenizer, scenes = load_tokenizer(), Scenes(300, "train", 0)
    recipe: Recipe = paper("albef").recipe("quick")
    found = {}
    for name, mistakes, steps in (("right", {}, 14), ("no update", {"no_step": True}, 3)):
        torch.manual_seed(0)
        model = recipe.build(ALBEF, tokenizer)
        for block in model.fusion.blocks:
            plug(block)
        found[name] = short_run(step(**mistakes), model, scenes, tokenizer, steps)
    assert sum(found["right"][-4:]) / 4 < CONSTANT_ANSWER - 0.02 < min(found["no update"])


def plug(block: Block) -> None:
    mine = attention()(128, 4, 128)
    mine.load_state_dict(block.cross_attention.state_dict())
    block.cross_attention = mine
