"""What transformers promises of every model, held of this one.

The contracts are those of transformers' own `tests/test_modeling_common.py` and `tests/generation/test_utils.py`:

Loading, saving, weights
- save_load, can_use_safetensors, sharded: `test_mirasol.py::test_saved_and_loaded_is_equal`,
  test_sharded_weights_load_the_same
- tied_weights_keys, load_save_without_tied_weights: test_tied_embeddings_stay_tied, test_parted_embeddings_stay_parted
- resize_tokens_embeddings, resize_embeddings_untied: test_the_vocabulary_can_grow
- model_get_set_embeddings: test_embeddings_can_be_replaced
- initialization, can_init_all_missing_weights: test_every_parameter_is_initialised_as_documented,
  test_weights_left_out_are_initialised
- meta device, low memory load, buffers: test_meta_to_memory
- dtype of loading, keep_in_fp32 (nothing is kept): test_loads_in_the_precision_asked_for
- offload, model parallelism (`_no_split_modules`): test_layers_are_kept_whole
- deepcopy and pickling of config and model: test_config_and_model_can_be_copied_and_pickled

The forward pass
- forward_signature, model_main_input_name: test_the_signature_of_forward
- model_outputs_equivalence, return_dict: test_a_tuple_holds_what_the_output_holds
- attention_outputs, hidden_states_output: test_attentions_and_hidden_states
- retain_grad_hidden_states_attentions: test_gradients_reach_what_the_layers_went_through
- inputs_embeds, inputs_embeds_matches_input_ids: test_embedded_text_is_the_same_text
- determinism, batching_equivalence, left_padding_compatibility: `test_mirasol.py`; right padding:
  test_padding_on_either_side_changes_nothing
- training, bf16: test_trains_a_step_in, test_bf16_is_near_fp32
- training_gradient_checkpointing (three): `test_recomputation.py`
- eager_matches_sdpa, flex, dispatch, attn_implementation: `test_attention.py`
- torch_compile: `test_recomputation.py`; torch_export: test_the_whole_model_exports
- the class's flags: test_what_the_class_promises

Generation
- greedy, sample, beam, beam sample, several returned: test_ways_to_generate, test_one_beam_is_greedy,
  test_greedy_is_the_likeliest_token_each_time
- dict outputs with scores, attentions, hidden states: test_generation_can_be_looked_into
- several end tokens: test_generation_stops_at_any_end_token
- no cache, static cache, past_key_values: `test_mirasol.py`; continue from them: test_generation_goes_on_from_a_cache
- generate from encoder_outputs: `test_mirasol.py::test_one_encoding_serves_many_prompts`
- assisted decoding, prompt lookup, quantised cache: refused, test_what_generate_cannot_do_is_refused
- generation_config: test_the_generation_config_is_saved

Nothing to hold: head masking and pruning, feed-forward chunking, problem types of classifiers, rotary scaling; the
model has no such feature.
"""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError
from mirasol.model.kernels import find_layers

MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
UNTIED = {"text": {"vocab_size": 40, "tied": False}}


def build(**parts) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(
        MirasolConfig.preset("tiny", **(parts or {"text": {"vocab_size": 40}}))
    ).eval()


@pytest.fixture
def inputs(batch) -> dict[str, torch.Tensor]:
    """Media, and prompts of four tokens."""
    media = {name: batch[name] for name in MEDIA}
    return media | {
        "decoder_input_ids": batch["decoder_input_ids"][:, :4],
        "decoder_attention_mask": torch.ones(6, 4, dtype=torch.long),
    }


def to(dtype, batch):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


# Loading, saving, weights


def test_sharded_weights_load_the_same(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)


def test_tied_embeddings_stay_tied(model, tmp_path):
    """They are one parameter, in memory and on disk."""
    model.save_pretrained(tmp_path)
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.text.output_weight is loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings() is None
    assert sum(value.shape[0] == 40 for value in loaded.state_dict().values()) == 1


def test_parted_embeddings_stay_parted(batch, tmp_path):
    model = build(**UNTIED)
    model.save_pretrained(tmp_path)
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.text.output_weight is loaded.get_output_embeddings().weight
    assert not torch.equal(loaded.text.output_weight, loaded.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("parts", [{}, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [55, 30])
def test_the_vocabulary_can_grow(parts, size, batch, tmp_path):
    """And shrink; tokens that stay keep their logits, and what is saved has the new size."""
    model = build(**parts)
    batch["decoder_input_ids"] %= 30
    batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["labels"] % 30)
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == model.config.text.vocab_size == size
        after = model(**batch).logits
        assert after.shape[-1] == size
        torch.testing.assert_close(after[..., :30], before[..., :30], **TOLERANCE)
        model.save_pretrained(tmp_path)
        loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits, after)


def test_embeddings_can_be_replaced(model, inputs):
    new = torch.nn.Embedding(40, model.config.text.stack.width)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new and model.text.output_weight is new.weight
    parted = build(**UNTIED)
    output = torch.nn.Linear(model.config.text.stack.width, 40, bias=False)
    parted.set_output_embeddings(output)
    assert parted.text.output_weight is output.weight


@pytest.mark.parametrize("kind", ["transformer", "cls", "perceiver", "ttm"])
def test_every_parameter_is_initialised_as_documented(kind):
    """Fan-in scaled normal weights, zero biases, norms of one, codes of 0.02: nothing is left as memory had it."""
    with torch.device("meta"):
        config = MirasolConfig.preset("tiny", text={"vocab_size": 40}, combiner={"kind": kind})
        model = MirasolForConditionalGeneration(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
        parameter._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    torch.manual_seed(0)
    model.init_weights()
    owners = {f"{path}.{name}": (module, name) for path, module in model.named_modules() for name in module._parameters}
    for name, parameter in model.state_dict().items():
        module, own = owners[name]
        assert parameter.isfinite().all(), name
        if isinstance(module, torch.nn.LayerNorm):
            assert (parameter == (1 if own == "weight" else 0)).all(), name
        elif own == "bias":
            assert (parameter == 0).all(), name
        else:
            fan_in = parameter[0].numel()
            expected = fan_in**-0.5 if isinstance(module, torch.nn.Linear | torch.nn.Conv3d) else 0.02
            expected = parameter.shape[1] ** -0.5 if isinstance(module, torch.nn.Embedding) else expected
            expected = 2.0 if name in ("combiner.cls", "combiner.latents") else expected
            assert abs(parameter.mean()) < 5 * expected * parameter.numel() ** -0.5, name
            # The standard deviation of n values is known to within itself over the root of 2n.
            assert parameter.std() == pytest.approx(expected, rel=max(0.05, 4 * (2 * parameter.numel()) ** -0.5)), name


def test_weights_left_out_are_initialised(model, tmp_path):
    """A checkpoint without some weights: these, and only these, are drawn anew."""
    model.save_pretrained(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("reconstruction.")}
    loaded, report = MirasolForConditionalGeneration.from_pretrained(
        None, config=model.config, state_dict=state, output_loading_info=True
    )
    assert all(name.startswith("reconstruction.") for name in report["missing_keys"])
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all() and (name not in state or torch.equal(value, state[name])), name


def test_meta_to_memory(model, batch):
    """A model made on the meta device and filled later is the model: no buffer holds anything of its own."""
    with torch.device("meta"):
        empty = MirasolForConditionalGeneration(copy.deepcopy(model.config))
    assert all(parameter.is_meta for parameter in empty.parameters()) and not list(empty.buffers())
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(empty.eval()(**batch).loss, model(**batch).loss)


def test_loads_in_the_precision_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    for asked, expected in {"bfloat16": torch.bfloat16, torch.float32: torch.float32, "auto": torch.float32}.items():
        loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    half = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(half)
    assert MirasolForConditionalGeneration.from_pretrained(half, dtype="auto").dtype == torch.bfloat16


def test_layers_are_kept_whole(model):
    """What a device map must not split: all layers of all stacks, by the names of their classes."""
    assert {type(layer).__name__ for layer in find_layers(model)} <= set(model._no_split_modules)


def test_config_and_model_can_be_copied_and_pickled(model, batch):
    assert copy.deepcopy(model.config).to_dict() == model.config.to_dict()
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
    with torch.no_grad():
        expected = model(**batch).loss
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**batch).loss, expected)


# The forward pass


def test_what_the_class_promises(model):
    """Each flag has a test that holds it: attention, recomputation, caches, layers that stay whole."""
    assert model._supports_sdpa and model._supports_flex_attn and not model._supports_flash_attn
    assert model.supports_gradient_checkpointing and model._supports_default_dynamic_cache()
    assert model.can_generate() and model.config.is_encoder_decoder


def test_the_signature_of_forward(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names[0] == model.main_input_name == "video"
    assert {"decoder_input_ids", "decoder_attention_mask", "encoder_outputs", "past_key_values", "labels"} <= set(names)
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, "no **kwargs that would swallow a slip"


def test_a_tuple_holds_what_the_output_holds(model, batch):
    with torch.no_grad():
        named = model(**batch, output_attentions=True, output_hidden_states=True)
        plain = model(**batch, output_attentions=True, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named)
    torch.testing.assert_close(plain, named.to_tuple())
    assert torch.equal(plain[0], named.loss)


def test_attentions_and_hidden_states(model, batch):
    text, length = model.config.text.stack, batch["decoder_input_ids"].shape[1]
    latents = batch["video"].shape[1] * model.config.combiner.m
    with torch.no_grad():
        bare = model(**batch)
        output = model(**batch, output_attentions=True, output_hidden_states=True)
    assert bare.decoder_attentions is bare.cross_attentions is bare.decoder_hidden_states is None
    assert len(output.decoder_attentions) == text.depth == len(output.decoder_hidden_states) - 1
    assert len(output.cross_attentions) == text.depth // model.config.text.cross_attention_every
    assert {tuple(w.shape) for w in output.decoder_attentions} == {(6, text.heads, length, length)}
    assert {tuple(w.shape) for w in output.cross_attentions} == {(6, text.heads, length, latents)}
    for weights in (*output.decoder_attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    assert all((weights[:, :, future] == 0).all() for weights in output.decoder_attentions)
    torch.testing.assert_close(model.text.logits(output.decoder_hidden_states[-1]), output.logits)
    torch.testing.assert_close(output.logits, bare.logits, **TOLERANCE)


def test_gradients_reach_what_the_layers_went_through(model, inputs):
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    kept = (
        output.encoder_last_hidden_state,
        output.decoder_hidden_states[0],
        output.decoder_attentions[0],
        output.cross_attentions[0],
    )
    for tensor in kept:
        tensor.retain_grad()
    output.logits.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


def test_embedded_text_is_the_same_text(model, batch):
    ids = batch.pop("decoder_input_ids")
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        given = model(**batch, decoder_inputs_embeds=embedded)
        assert torch.equal(given.loss, model(**batch, decoder_input_ids=ids).loss)
    for both in ({}, {"decoder_input_ids": ids, "decoder_inputs_embeds": embedded}):
        with pytest.raises(UserError, match="exactly one of decoder_input_ids and decoder_inputs_embeds"):
            model(**batch, **both)


def test_padding_on_either_side_changes_nothing(model, inputs):
    ids, mask = inputs.pop("decoder_input_ids"), inputs.pop("decoder_attention_mask")
    none = torch.zeros(6, 3, dtype=torch.long)
    with torch.no_grad():
        plain = model(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        for side in ("left", "right"):
            padded = [torch.cat([none, part] if side == "left" else [part, none], dim=1) for part in (ids, mask)]
            given = model(**inputs, decoder_input_ids=padded[0], decoder_attention_mask=padded[1]).logits
            torch.testing.assert_close(given[:, 3:] if side == "left" else given[:, :4], plain, **TOLERANCE)


def test_bf16_is_near_fp32(model, batch):
    with torch.no_grad():
        expected = model(**batch)
        output = copy.deepcopy(model).to(torch.bfloat16)(**to(torch.bfloat16, batch))
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.15, rtol=0.05)
    assert output.loss == pytest.approx(expected.loss.item(), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("kind", ["transformer", "ttm"])
def test_trains_a_step_in(precision, kind, batch):
    model = build(text={"vocab_size": 40}, combiner={"kind": kind, "ttm": {"read_tokens": 16, "memory_tokens": 8}})
    model.train()
    if precision == "bf16 weights":
        model, batch = model.to(torch.bfloat16), to(torch.bfloat16, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
        loss = model(**batch).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_the_whole_model_exports(model, inputs):
    """As one graph by `torch.export`, which then gives the same."""
    names = list(inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(program.module()(**{name: inputs[name] for name in names}).logits, expected)


# Generation

WAYS = {
    "greedy": {},
    "sample": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_ways_to_generate(settings, model, inputs):
    """Each gives rows of the asked length that begin with the prompt, the same for the same seed."""
    generated = []
    for _ in range(2):
        torch.manual_seed(1)
        generated.append(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **settings))
    several = settings.get("num_return_sequences", 1)
    assert generated[0].shape == (6 * several, 8)
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0][:, :4], inputs["decoder_input_ids"].repeat_interleave(several, 0))


def test_greedy_is_the_likeliest_token_each_time(model, inputs):
    generated = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    ids = inputs.pop("decoder_input_ids")
    inputs.pop("decoder_attention_mask")
    with torch.no_grad():
        for _ in range(3):
            logits = model(**inputs, decoder_input_ids=ids).logits[:, -1].clone()
            logits[:, model.config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)


def test_one_beam_is_greedy(model, inputs):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, **settings, num_beams=1))


def test_generation_can_be_looked_into(model, inputs):
    output = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, output_scores=True,
        output_logits=True, output_attentions=True, output_hidden_states=True,
    )  # fmt: skip
    assert len(output.scores) == len(output.logits) == len(output.cross_attentions) == 3
    assert len(output.decoder_attentions) == len(output.decoder_hidden_states) == 3
    assert output.cross_attentions[1][0].shape[2] == 1, "one query a step when there is a cache"
    assert output.past_key_values.get_seq_length() == 6


def test_generation_stops_at_any_end_token(model, inputs):
    free = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    ends = [free[0, 4].item(), free[1, 4].item()]
    stopped = model.generate(**inputs, max_new_tokens=6, eos_token_id=ends)
    assert torch.equal(stopped[:2, 4], free[:2, 4])
    assert (stopped[:2, 5:] == model.config.pad_token_id).all()


def test_generation_goes_on_from_a_cache(model, inputs):
    """Three tokens and then three more are six."""
    settings = {"do_sample": False, "return_dict_in_generate": True}
    whole = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **settings).sequences
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, past_key_values=cache, **settings)
    inputs["decoder_input_ids"] = first.sequences
    inputs["decoder_attention_mask"] = torch.ones_like(first.sequences)
    second = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, past_key_values=first.past_key_values, **settings
    )
    assert torch.equal(second.sequences, whole)


@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_what_generate_cannot_do_is_refused(helper, model, inputs):
    with pytest.raises(UserError, match=f"{helper} is not supported"):
        model.generate(**inputs, **{helper: model if helper == "assistant_model" else 2})


def test_the_generation_config_is_saved(model, inputs, tmp_path):
    model.generation_config.max_new_tokens = 2
    model.generation_config.min_new_tokens = 2
    model.save_pretrained(tmp_path)
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 2
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id
    assert loaded.generate(**inputs).shape == (6, 6)
