"""Recomputed activations and compiled layers change memory and speed, never a result."""

import copy
import pickle
import warnings

import jaxtyping
import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.config.parts import StackConfig
from mirasol.model.combiner import PerceiverBlock
from mirasol.model.kernels import compile_layers, find_layers
from mirasol.model.masks import BlockCausal
from mirasol.model.text import TextBlock
from mirasol.model.transformer import Block, FeedForward, Stack

LAYERS = {Block, PerceiverBlock, TextBlock}
MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
DROPOUT = {"vit": {"dropout": 0.1}, "combiner": {"stack": {"dropout": 0.1}}, "text": {"stack": {"dropout": 0.2}}}


def build(combiner: str = "transformer", parts: dict | None = None) -> MirasolForConditionalGeneration:
    parts = copy.deepcopy(parts or {})
    parts.setdefault("text", {})["vocab_size"] = 40
    parts.setdefault("combiner", {}).update(kind=combiner, ttm={"read_tokens": 16, "memory_tokens": 8})
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(MirasolConfig.preset("tiny", **parts)).train()


def step(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, every gradient, and the bytes that the forward pass kept for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(storages.values())


@pytest.mark.parametrize("kind", ["transformer", "cls", "perceiver", "ttm"])
def test_recomputing_changes_no_gradient_and_keeps_less(kind, batch):
    model = build(kind, DROPOUT)
    loss, gradients, kept = step(model, batch)
    for what in ("hidden", "block"):
        model.recompute_activations(what)
        assert model.is_gradient_checkpointing
        again, others, less = step(model, batch)
        assert torch.equal(again, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
        assert less < 0.9 * kept, (what, less, kept)
        kept = less
    model.recompute_activations("none")
    assert not model.is_gradient_checkpointing
    assert step(model, batch)[2] > kept


def enable(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename it
        model.gradient_checkpointing_enable(**settings)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_own_switch_works(batch, reentrant):
    model = build(parts=DROPOUT)
    loss, gradients, _ = step(model, batch)
    enable(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in find_layers(model))
    again, others, _ = step(model, batch)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(others, gradients, atol=1e-6, rtol=1e-5)


def test_every_layer_is_recomputed_and_no_feed_forward_twice(model):
    kinds = {type(module) for module in find_layers(model)}
    assert kinds < LAYERS
    model.recompute_activations("block")
    assert not any(hasattr(m, "gradient_checkpointing") for m in model.modules() if isinstance(m, FeedForward))
    model.recompute_activations("hidden")
    assert not any(hasattr(layer, "gradient_checkpointing") for layer in find_layers(model))


def test_a_cache_is_not_written_twice(model, batch):
    """A recomputed layer with a cache would append its keys again: such a call is not recomputed."""
    model.train()
    model.config.latent.mask_ratio = model.latent.mask_ratio = 0.0
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    results = []
    for what in ("none", "block"):
        model.recompute_activations(what)
        model.zero_grad()
        output = model(**inputs, use_cache=True)
        output.logits.square().mean().backward()
        assert output.past_key_values.get_seq_length() == batch["decoder_input_ids"].shape[1]
        results.append(model.chunk_encoder.vit.blocks[0].attention.query.weight.grad.clone())
    torch.testing.assert_close(*results)


def test_a_model_that_recomputes_can_be_copied_pickled_and_saved(model, batch, tmp_path):
    names = list(model.state_dict())
    model.recompute_activations("block")
    assert list(model.state_dict()) == names
    with torch.no_grad():
        expected = model(**batch).loss
        twin = copy.deepcopy(model)
        assert next(find_layers(twin)).forward.module is next(find_layers(twin))
        for other in (twin, pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**batch).loss, expected)
    model.save_pretrained(tmp_path)
    assert not MirasolForConditionalGeneration.from_pretrained(tmp_path).is_gradient_checkpointing


def test_what_cannot_be_recomputed_is_named(model):
    with pytest.raises(UserError, match="'blocks': choose one of none, hidden, block"):
        model.recompute_activations("blocks")


@pytest.fixture
def unchecked():
    """The compiler cannot trace the tests' shape checks."""
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled_equals_eager(backend: str, batch, what: str, parts: dict):
    """Loss and gradients of a compiled model against those of a plain one; then again, which compiles nothing."""
    model, plain = build(parts=parts), build(parts=parts)
    plain.latent.mask_ratio = model.latent.mask_ratio = 0.0
    names = list(model.state_dict())
    model.recompute_activations(what)
    model.compile_blocks(backend)
    assert list(model.state_dict()) == names
    loss, gradients, _ = step(plain, batch)
    for _ in range(2):
        before = graphs()
        again, others, _ = step(model, batch)
        torch.testing.assert_close(again, loss, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(others, gradients, atol=1e-5, rtol=1e-3)
    assert before > 0 and graphs() == before and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_stack_computes_the_same():
    """The quick form of the tests below: two graphs, for all outputs of a layer and for the last of each chunk."""
    stack = Stack(StackConfig(3, 16, 32, 2, 8))
    twin = copy.deepcopy(stack)
    compile_layers(twin, "aot_eager")
    x, mask = torch.randn(2, 12, 16, requires_grad=True), BlockCausal(3, 4, 4)
    before = graphs()
    for _ in range(2):
        stack.zero_grad()
        twin.zero_grad()
        expected, given = stack(x, mask, last=2), twin(x, mask, last=2)
        torch.testing.assert_close(given, expected)
        expected.square().sum().backward()
        given.square().sum().backward()
        assert graphs() == before + 2 and not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(stack.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("what", ["none", "hidden", "block"])
def test_compiled_layers_compute_the_same(what, batch):
    compiled_equals_eager("aot_eager", batch, what, {})


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_compiled_layers_pass_over_the_same_branches(batch):
    """Layer drop draws outside of the layers: the random numbers are those of an eager model, and one graph serves all
    rates."""
    stacks = ("combiner", "latent", "reconstruction", "text")
    parts = {"vit": {"layer_drop": 0.3}} | {name: {"stack": {"layer_drop": 0.3}} for name in stacks}
    compiled_equals_eager("aot_eager", batch, "none", parts)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_layers_compiled_to_machine_code_compute_the_same(batch):
    compiled_equals_eager("inductor", batch, "none", {})


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_compiled_model_generates_the_same(model, batch):
    inputs = {name: batch[name] for name in MEDIA} | {"decoder_input_ids": batch["decoder_input_ids"][:, :4]}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    model.compile_blocks("eager")
    assert torch.equal(model.generate(**inputs, **settings), expected)
