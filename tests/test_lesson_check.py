"""What all exercise checks share: copies for the student, losses that train, messages without answers."""

import pytest
import torch

from minivlp.lessons.check import NotYet, attempt, attempt_with, demand, demand_gradients


def test_a_notebook_shows_the_message_and_no_line_of_the_check():
    InteractiveShell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    shell = InteractiveShell.instance()
    shown = []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    shell.run_cell("from minivlp.lessons.check import demand\ndemand(False, 'the rows must sum to one')")
    assert shown == ["Not yet: the rows must sum to one"]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3, 4), torch.ones(3, 4).T, torch.ones(3, 2, 4)[:, 0], torch.ones(3, 1).expand(3, 4), torch.tensor(1.0)],
)
def test_in_place_work_does_not_reach_the_checks_tensors(tensor):
    before = tensor.clone()
    strides = []

    def in_place(one, many):
        strides.append(one.stride())
        one += 1
        many[0].zero_()
        return one

    assert torch.equal(attempt(in_place, tensor, [tensor]), before + 1)
    assert torch.equal(tensor, before)
    assert strides == [tensor.stride()] or 0 in tensor.stride()


def test_gradients_pass_through_the_copies():
    weight = torch.ones(3, requires_grad=True)
    attempt(lambda x: x.mul_(2).sum(), weight).backward()
    assert weight.grad.tolist() == [2, 2, 2]


def test_arguments_are_the_checks_own_where_it_asks_for_that():
    tensor = torch.ones(2)
    attempt_with(lambda x: x.zero_(), tensor)
    assert not tensor.any()


def test_messages_name_the_line_and_shapes_but_no_numbers():
    def broken(weights, m):
        return weights[0] @ torch.ones(7)

    shown = r"stopped with RuntimeError: .*called with \[\(30, 40\), \(4,\)\], 0.5\)"
    with pytest.raises(NotYet, match=shown) as failed:
        attempt(broken, [torch.zeros(30, 40), torch.zeros(4)], 0.5)
    assert "return weights[0] @ torch.ones(7)" in str(failed.value)
    assert "tensor(" not in str(failed.value)


def leaves():
    a, b = torch.arange(1.0, 4), torch.arange(2.0, 5)
    return a.requires_grad_(), b.requires_grad_()


def test_a_loss_with_the_right_gradients_passes():
    a, b = leaves()
    demand_gradients((a * b).sum(), (b * a).sum(), a=a, b=b)


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda a, b: (a * b).sum().item(), "has no gradient"),
        (lambda a, b: (a * b).sum().detach(), "has no gradient"),
        (lambda a, b: (a * b.detach()).sum(), "`b` no gradient"),
        (lambda a, b: (a.detach() * b).sum(), "`a` no gradient"),
        (lambda a, b: ((a * b).sum() + (a.detach() * b).sum()) / 2, "gradient for `a` is another"),
    ],
)
def test_a_loss_that_cannot_train_is_refused(loss, message):
    a, b = leaves()
    with pytest.raises(NotYet, match=message):
        demand_gradients(loss(a, b), (a * b).sum(), a=a, b=b)


def test_a_target_must_be_detached():
    a, b = leaves()
    with pytest.raises(NotYet, match="it is a target"):
        demand_gradients((a * b).sum(), (a * b.detach()).sum(), a=a, b=b)


def test_demand_is_silent_when_it_holds():
    demand(torch.tensor(True), "never")
