"""Properties of attention: the masks say who sees whom, and every implementation computes the same."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.model import kernels, transformer
from mirasol.model.kernels import ATTENTION, Kernels
from mirasol.model.masks import TILE, BlockCausal, ResamplerMask

CPU = torch.device("cpu")
EAGER, SDPA = Kernels(attend_dense=kernels.attend_eager), Kernels()
FLEX = Kernels(sparse_masks=True)
MASKS = [
    BlockCausal(2, 2, 2),
    BlockCausal(5, 60, 60),  # tiles that are hidden, partly visible and wholly visible
    BlockCausal(4, 128, 128),
    BlockCausal(7, 8, 100),  # the last outputs of each chunk
    BlockCausal(7, 60, 60, window=2),
    BlockCausal(3, 200, 300, window=1),
    ResamplerMask(5, 30, 70),
    ResamplerMask(6, 40, 128, window=2),
]


def test_block_causal_by_hand():
    assert BlockCausal(2, 2, 2).dense(CPU).tolist() == [[True, True, False, False]] * 2 + [[True] * 4] * 2
    assert BlockCausal(3, 1, 1, window=2).dense(CPU).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]
    # Two features, then two latents: a latent sees the features so far and itself.
    assert ResamplerMask(2, 1, 1).dense(CPU).tolist() == [[True, False, True, False], [True, True, False, True]]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_dense_mask_takes_a_byte_a_pair_while_it_is_made(mask):
    """A matrix of 64-bit differences would be eight times as large as the mask: 80 GB for 512 large frames."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.append(result.nbytes if min(result.shape) > 1 and result.ndim == 2 else 0)
            return result

    with Watch():
        dense = mask.dense(CPU)
    assert dense.nbytes == max(largest) == mask.lengths[0] * mask.lengths[1]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_mask_for_the_last_queries_is_the_whole_mask_cut(mask):
    whole = mask.dense(CPU).unflatten(0, (mask.chunks, -1))
    last = max(1, mask.query_tokens // 2)
    if type(mask) is BlockCausal:
        assert torch.equal(mask.for_last(last).dense(CPU), whole[:, -last:].flatten(0, 1))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_tiles_say_what_the_dense_mask_says(mask):
    """A tile called hidden holds nothing visible, a tile called whole nothing hidden; no tile is called more visible
    than it is, but for the resampler's own queries."""
    dense, (some, every) = mask.dense(CPU), mask.tiles(CPU)
    assert some.shape == tuple(-(-length // TILE) for length in mask.lengths)
    for row in range(some.shape[0]):
        for column in range(some.shape[1]):
            tile = dense[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            assert some[row, column] or not tile.any()
            assert tile.all() or not every[row, column]
            if type(mask) is BlockCausal:
                assert some[row, column] == tile.any()
                assert every[row, column] == (tile.all() and tile.shape == (TILE, TILE))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_implementation_computes_the_same(mask):
    queries, keys = mask.lengths
    q, k, v = torch.randn(2, 3, queries, 16), torch.randn(2, 3, keys, 16), torch.randn(2, 3, keys, 16)
    fast, eager, flex = (each.attend(q, k, v, each.prepare_mask(mask, CPU)) for each in (SDPA, EAGER, FLEX))
    _, weights = kernels.attend_eagerly(q, k, v, mask.dense(CPU))
    assert (weights[:, :, ~mask.dense(CPU)] == 0).all()
    torch.testing.assert_close(fast, eager)
    torch.testing.assert_close(fast, flex)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_may_look_nowhere_gets_nothing_from_every_implementation(dtype):
    """A clip without a real chunk among others that have some."""
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    for each in (EAGER, SDPA, Kernels(attend_dense=kernels.attend_on_processor)):
        assert torch.equal(each.attend(q, k, v, mask)[1], torch.zeros(2, 5, 4, dtype=dtype))


def test_a_sparse_mask_is_made_once_and_of_tiles_only():
    """At the paper's longest: 64 chunks of 1,616 tokens, whose dense mask would take 10 GB."""
    mask = BlockCausal(64, 1616, 1616)
    sparse = mask.sparse(CPU)
    assert sparse is BlockCausal(64, 1616, 1616).sparse(CPU)
    assert sparse.shape[-2:] == (64 * 1616, 64 * 1616)
    # Percent hidden: little under half, for a chunk sees itself.
    assert 45 < sparse.sparsity() < 50


def test_flex_attention_refuses_to_leave_dropout_out():
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(UserError, match="attention_dropout=0.1"):
        FLEX.attend(q, q, q, BlockCausal(2, 2, 2).sparse(CPU), 0.1)


def loaded(folder, implementation):
    return MirasolForConditionalGeneration.from_pretrained(folder, attn_implementation=implementation).eval()


@pytest.mark.parametrize("kind", ["transformer", "cls", "perceiver", "ttm"])
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_the_model_gives_the_same_whatever_computes_attention(kind, implementation, batch, tmp_path):
    config = MirasolConfig.preset("tiny", text={"vocab_size": 40}, combiner={"kind": kind})
    torch.manual_seed(0)
    MirasolForConditionalGeneration(config).save_pretrained(tmp_path)
    plain, other = loaded(tmp_path, "sdpa"), loaded(tmp_path, implementation)
    assert other.config._attn_implementation == implementation
    with torch.no_grad():
        expected, given = plain(**batch), other(**batch)
        for name in ("logits", "latents", "reconstruction", "loss"):
            torch.testing.assert_close(given[name], expected[name], atol=1e-5, rtol=1e-4)


def test_the_implementation_reaches_every_attention(model, batch, monkeypatch):
    """Counted at the kernels: under eager none is SDPA; under flex the masked stacks are flex."""
    calls = {"sdpa": 0, "flex": 0}
    sdpa, flex = kernels.F.scaled_dot_product_attention, kernels.flex_attention

    def counted(name, function):
        def call(*args, **settings):
            calls[name] += 1
            return function(*args, **settings)

        return call

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", counted("sdpa", sdpa))
    monkeypatch.setattr(kernels, "flex_attention", counted("flex", flex))
    attentions = sum(isinstance(module, transformer.Attention) for module in model.modules())
    depths = model.config.combiner.stack.depth + model.config.latent.stack.depth
    vit = model.config.vit.depth  # reads video and audio, one after the other
    for implementation, expected in {
        "eager": (0, 0), "sdpa": (attentions + vit, 0), "flex_attention": (attentions + vit - depths, depths),
    }.items():  # fmt: skip
        model.set_attn_implementation(implementation)
        calls.update(sdpa=0, flex=0)
        with torch.no_grad():
            model(**batch)
        assert (calls["sdpa"], calls["flex"]) == expected


@pytest.mark.parametrize("wrong", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "fast"])
def test_an_implementation_that_cannot_be_is_refused(wrong, model, tmp_path):
    with pytest.raises(UserError, match="choose one of eager, sdpa, flex_attention"):
        model.set_attn_implementation(wrong)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=wrong):
        loaded(tmp_path, wrong)


def test_attention_weights_can_be_had_under_every_implementation(model, batch):
    outputs = {}
    for implementation in ATTENTION:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs[implementation] = model(**batch, output_attentions=True).cross_attentions
    for weights in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(weights[0], weights[1])
        torch.testing.assert_close(weights[0], weights[2])


def test_flex_attention_has_no_backward_on_a_cpu(model, batch):
    """What keeps it from being tested in training here; when this fails, torch has learnt it."""
    model.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        model(**batch).loss.backward()


def test_a_mask_takes_the_form_its_implementation_reads():
    mask = BlockCausal(2, 2, 2)
    assert isinstance(FLEX.prepare_mask(mask, CPU), BlockMask)
    assert torch.equal(SDPA.prepare_mask(mask, CPU), mask.dense(CPU))
    assert SDPA.prepare_mask(None, CPU) is None
