"""Lesson 01's checks: the solution passes, typical wrong answers fail with the message meant for them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minivlp.lessons import clip
from minivlp.lessons.check import NotYet


def loss(images, texts, temperature):
    logits = images @ texts.T / temperature
    truth = torch.arange(len(images))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def one_way(images, texts, temperature):
    return F.cross_entropy(images @ texts.T / temperature, torch.arange(len(images)))


def recall(similarity, k):
    nearest = similarity.topk(k, dim=1).indices
    return (nearest == torch.arange(len(similarity))[:, None]).any(1).float().mean().item()


def zero_shot(images, prompts):
    return (images @ F.normalize(prompts.mean(1), dim=-1).T).argmax(1)


def targets(image_ids):
    same = (image_ids[:, None] == image_ids[None]).float()
    return same / same.sum(1, keepdim=True)


def loss_in_place(images, texts, temperature):
    images /= temperature
    table, truth = images @ texts.T, torch.arange(len(images))
    return (F.cross_entropy(table, truth) + F.cross_entropy(table.T, truth)) / 2


def recall_in_place(similarity, k):
    own = similarity.diagonal().clone()
    similarity -= own[:, None]
    return ((similarity > 0).sum(1) < k).float().mean().item()


def zero_shot_in_place(images, prompts):
    prompts = prompts.cumsum_(dim=1)[:, -1]
    return (images @ prompts.div_(prompts.norm(dim=-1, keepdim=True)).T).argmax(1)


def votes(images, prompts):
    return torch.einsum("ne,cke->nck", images, prompts).argmax(1).mode(1).values


RIGHT = [(clip.check_loss, loss_in_place), (clip.check_recall, recall_in_place)]
RIGHT += [(clip.check_zero_shot, zero_shot_in_place)]
RIGHT += [(clip.check_loss, loss), (clip.check_recall, recall), (clip.check_zero_shot, zero_shot)]
RIGHT += [(clip.check_targets, targets)]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (clip.check_loss, stub, "Nothing written yet"),
    (clip.check_loss, lambda i, t, tau: None, "`return` missing"),
    (clip.check_loss, one_way, "one direction only"),
    (clip.check_loss, lambda i, t, tau: one_way(t, i, tau), "one direction only"),
    (clip.check_loss, lambda i, t, tau: 2 * loss(i, t, tau), "sum of both directions"),
    (clip.check_loss, lambda i, t, tau: loss(i, t, 1 / tau), "Divide the cosines by the temperature"),
    (clip.check_loss, lambda i, t, tau: loss(i, t, 1.0), "not used"),
    (clip.check_loss, lambda i, t, tau: i @ t.T, "one number"),
    (clip.check_loss, lambda i, t, tau: i.missing, "AttributeError"),
    (clip.check_loss, lambda i, t, tau: loss(i, t, tau).item(), "has no gradient"),
    (clip.check_loss, lambda i, t, tau: loss(i, t, tau).detach(), "has no gradient"),
    (clip.check_loss, lambda i, t, tau: loss(i, t.detach(), tau), "`texts` no gradient"),
    (clip.check_loss, lambda i, t, tau: loss(i.detach(), t, tau), "`images` no gradient"),
    (clip.check_loss, lambda i, t, tau: (one_way(i, t, tau) + one_way(t, i.detach(), tau)) / 2, "is another one"),
    (clip.check_recall, lambda s, k: recall(s.T, k), "down the columns"),
    (clip.check_recall, lambda s, k: recall(s, 1), "always there"),
    (clip.check_recall, lambda s, k: recall(-s, k), "two of three"),
    (clip.check_zero_shot, lambda i, p: (i @ p.mean(1).T).argmax(1), "back to length one"),
    (clip.check_zero_shot, lambda i, p: (i @ p[:, 0].T).argmax(1), "Only the first prompt"),
    (clip.check_zero_shot, lambda i, p: torch.einsum("ne,cke->nck", i, p).amax(2).argmax(1), "nearest single prompt"),
    (clip.check_zero_shot, lambda i, p: (i @ F.normalize(p.mean(1), dim=0).T).argmax(1), "last axis"),
    (clip.check_zero_shot, votes, "prompts vote"),
    (clip.check_zero_shot, lambda i, p: (i @ F.normalize(p.sum(1) + p[:, 0], dim=-1).T).argmax(1), "random images"),
    (clip.check_zero_shot, lambda i, p: zero_shot(i, p).squeeze(), r"shape \(1,\)"),
    (clip.check_zero_shot, lambda i, p: (i @ p.mean(1).T).argmax(0), "One class per image"),
    (clip.check_zero_shot, lambda i, p: (i @ p.mean(1).T).argmin(1), "easy images"),
    (clip.check_targets, lambda ids: torch.eye(len(ids)), "diagonal alone"),
    (clip.check_targets, lambda ids: (ids[:, None] == ids[None]).float(), "sum to one"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)


class Twins:
    """Four scenes: two with the same objects in another order, one with one object twice, one alone."""

    captions = ("a dog left of a cat", "a cat left of a dog", "a red cup", "a red cup above a dog")
    objects = (("dog", "cat"), ("cat", "dog"), ("cup",), ("cup", "dog"))

    def __len__(self):
        return 4

    def scene(self, row):
        objects = [SimpleNamespace(noun=noun, color=None) for noun in self.objects[row]]
        return SimpleNamespace(objects=objects, captions=lambda: [self.captions[row]])


def test_batches_in_which_only_the_order_of_words_tells_pictures_apart_are_counted():
    assert clip.same_objects_elsewhere(Twins(), 4) == (1, 1)
    assert clip.same_objects_elsewhere(Twins(), 1) == (0, 4)
