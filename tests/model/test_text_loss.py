"""The text loss in slices: the value and the gradients of the plain form, without all its logits."""

import pytest
import torch
from torch.nn import functional as F

from mirasol.model.losses import text_loss

VOCABULARY, WIDTH, TARGETS = 500, 16, 37


def run(at_once: int):
    """Loss, gradients, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TARGETS,))
    storages, largest = {}, []

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def logits(rows):
        largest.append(len(rows))
        return F.linear(rows, weight)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = text_loss(hidden, labels, logits, VOCABULARY, at_once)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, sum(storages.values()), max(largest)


@pytest.mark.parametrize("rows", [1, 5, 36])
def test_slices_give_the_plain_value_and_gradients_and_keep_no_logits(rows):
    plain = run(TARGETS * VOCABULARY)
    sliced = run(rows * VOCABULARY)
    for expected, given in zip(plain[:3], sliced[:3], strict=True):
        torch.testing.assert_close(given, expected)
    assert (plain[4], sliced[4]) == (TARGETS, rows)
    logits = TARGETS * VOCABULARY * 4
    assert plain[3] >= logits > sliced[3]


def test_one_token_with_more_logits_than_allowed_is_a_slice():
    assert run(1)[4] == 1


def test_the_plain_form_is_the_cross_entropy():
    hidden, weight, labels = torch.randn(6, 8), torch.randn(20, 8), torch.randint(20, (6,))
    loss = text_loss(hidden, labels, lambda rows: F.linear(rows, weight), 20)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels))
