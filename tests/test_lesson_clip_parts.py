"""Lesson 01's exercises that build CLIP: the solution passes, typical wrong answers are told what failed."""

import math

import pytest
import torch
import torch.nn.functional as F

from minivlp.lessons.check import NotYet
from minivlp.lessons.clip_parts import check_step, check_vectors


def vectors(image_tokens, text_tokens, mask, project_image, project_text):
    last = text_tokens[torch.arange(len(mask)), mask.sum(dim=1) - 1]
    return F.normalize(project_image(image_tokens[:, 0]), dim=-1), F.normalize(project_text(last), dim=-1)


def vectors_by_gather(image_tokens, text_tokens, mask, project_image, project_text):
    place = (mask.long().sum(1) - 1)[:, None, None].expand(-1, 1, text_tokens.shape[-1])
    last = project_text(text_tokens.gather(1, place)[:, 0])
    first = project_image(image_tokens)[:, 0]
    return first / first.norm(dim=1, keepdim=True), last / last.norm(dim=1, keepdim=True)


def reading(image=lambda x: x[:, 0], text=None, finish=lambda x: F.normalize(x, dim=-1)):
    """The solution with another choice of tokens, or another last step."""

    def answer(image_tokens, text_tokens, mask, project_image, project_text):
        last = text_tokens[torch.arange(len(mask)), mask.sum(dim=1) - 1] if text is None else text(text_tokens)
        return finish(project_image(image(image_tokens))), finish(project_text(last))

    return answer


def step(model, images, text, loss, optimizer):
    optimizer.zero_grad()
    value = loss(*model(images, text), 1 / model.log_scale.exp())
    value.backward()
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(100))
    return value.item()


def without(part, value_of=lambda value: value.item()):
    """The solution without one of its lines, or with another return value."""

    def answer(model, images, text, loss, optimizer):
        if part != "zero_grad":
            optimizer.zero_grad()
        pictures, captions = model(images, text)
        captions = captions.detach() if part == "gradient of a tower" else captions
        scale = model.log_scale.detach() if part == "gradient of the scale" else model.log_scale
        value = loss(pictures, captions, scale.exp() if part == "1 /" else 1 / scale.exp())
        if part != "backward":
            value.backward()
        if part != "step":
            optimizer.step()
        with torch.no_grad():
            if part != "clamp":
                model.log_scale.clamp_(max=100 if part == "ln" else math.log(100))
        return value_of(value)

    return answer


def steps_twice(*arguments):
    step(*arguments)
    return step(*arguments)


@pytest.mark.parametrize(
    "check, answer", [(check_vectors, vectors), (check_vectors, vectors_by_gather), (check_step, step)]
)
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


@pytest.mark.parametrize(
    "answer, message",
    [
        (reading(finish=lambda x: x), "`images`: bring the projected vectors"),
        (reading(finish=lambda x: F.normalize(x, dim=0)), "along the last axis"),
        (reading(image=lambda x: x.mean(1)), "`images`: that is the mean of all tokens"),
        (reading(image=lambda x: x[:, 1]), "`images`: other vectors"),
        (reading(image=lambda x: x), r"`images`: one vector .* not \(3, 5, 4\)"),
        (reading(text=lambda x: x[:, -1]), "`texts`: the last place is padding"),
        (reading(text=lambda x: x[:, 0]), "`texts`: the text tower is causal"),
        (reading(text=lambda x: x.mean(1)), "`texts`: that is the mean of all tokens"),
        (lambda i, t, m, a, b: vectors(i, t, m, a, a), "`texts`: other vectors"),
        (lambda i, t, m, a, b: tuple(x.detach() for x in vectors(i, t, m, a, b)), "no gradient"),
        (
            lambda i, t, m, a, b: (vectors(i, t, m, a, b)[0], vectors(i, t, m, a, b)[1].detach()),
            "`text_tokens` no grad",
        ),
        (lambda i, t, m, a, b: vectors(i, t, m, a, b)[0], "two tensors"),
        (lambda i, t, m, a, b: tuple(x.squeeze() for x in vectors(i, t, m, a, b)), "batch of one pair"),
    ],
)
def test_wrong_vectors_are_told_what_failed(answer, message):
    with pytest.raises(NotYet, match=message):
        check_vectors(answer)


@pytest.mark.parametrize(
    "answer, message",
    [
        (without("zero_grad"), "zero_grad"),
        (without("backward"), "No parameter has changed"),
        (without("step"), "No parameter has changed"),
        (without("1 /"), "The first loss is"),
        (without("gradient of a tower"), "One tower has not changed"),
        (without("gradient of the scale"), "`log_scale` has not changed"),
        (without("clamp"), "100 at most"),
        (without("ln"), "100 at most"),
        (without("nothing", lambda value: value), "Return a number"),
        (without("nothing", lambda value: None), "`return` missing"),
        (steps_twice, "The first loss is"),
    ],
)
def test_a_wrong_step_is_told_what_failed(answer, message):
    with pytest.raises(NotYet, match=message):
        check_step(answer)


def test_a_step_must_use_the_loss_that_it_is_given():
    own = lambda pictures, captions, temperature: (pictures * captions).sum() * temperature  # noqa: E731
    with pytest.raises(NotYet, match="The first loss is"):
        check_step(lambda model, images, text, loss, optimizer: step(model, images, text, own, optimizer))
