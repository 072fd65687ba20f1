"""What `explain` reads out of a model is what the model does: weights, rollout, memory, occlusion."""

import numpy as np
import pytest
import torch
from explaining import COMBINERS, QUESTION, make_clip, make_model

from mirasol.errors import UserError
from mirasol.evaluation.answer import answer_clips
from mirasol.explain import explain
from mirasol.explain.reading import follow_back, read_combiner
from mirasol.explain.recording import compute_weights, list_attention, record_attention

every_combiner = pytest.mark.parametrize("name", COMBINERS)


def encode_features(name: str, clip, dtype: str = "float32"):
    model, processor = make_model(name, dtype)
    media = processor.feature_extractor.collate([processor.feature_extractor.tensors(clip)])
    with torch.no_grad():
        features = model.chunk_encoder(media["video"], media["audio"], media["video_mask"], media["audio_mask"])
    return model, processor, media, features


@every_combiner
@torch.no_grad()
def test_recorded_weights_reproduce_what_each_layer_computes(name, monkeypatch):
    """weights @ values, through the output's linear, is the plain pass's output; masked keys have exactly 0."""
    model, _, _, features = encode_features(name, make_clip(3, gaps=True))
    monkeypatch.setattr("mirasol.explain.recording.LARGEST_BLOCK", 7 * 3 * 63)  # several blocks of queries
    calls = []

    def keep(layer, args, kwargs, output):
        calls.append((layer, args, kwargs, output[0]))

    layers = list_attention(model.combiner) + list_attention(model.latent)
    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    model.latent(model.combiner(*features))
    for hook in hooks:
        hook.remove()
    assert len(calls) >= len(layers) > 0
    for layer, args, kwargs, output in calls:
        weights = torch.cat(list(compute_weights(layer, *args, **kwargs)), dim=2)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)
        mask = kwargs.get("mask", args[2] if len(args) > 2 else None)
        if mask is not None:
            assert (weights.masked_select(~mask) == 0).all()
        context = args[1] if len(args) > 1 and args[1] is not None else args[0]
        values = layer.keys_values(context)[1]
        torch.testing.assert_close(
            layer.output((weights @ values).transpose(1, 2).flatten(2)), output, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_recording_changes_nothing_and_ends(implementation):
    model, _, _, features = encode_features("transformer", make_clip(3))
    layers = list_attention(model.combiner)
    for layer in layers:
        layer.implementation = implementation
    try:
        before = model.combiner(*features)
        with record_attention(layers) as weights:
            during = model.combiner(*features)
        torch.testing.assert_close(during, before, atol=2e-5, rtol=0)
        assert len(weights) == len(layers)
        assert all(layer.implementation == implementation and not layer._forward_hooks for layer in layers)
        model.combiner(*features)
        assert len(weights) == len(layers)
    finally:
        for layer in layers:
            del layer.implementation


@every_combiner
@pytest.mark.parametrize("chunks", [1, 4])
def test_shares_sum_to_one_and_nothing_comes_of_the_future(name, chunks):
    model, processor, *_ = encode_features(name, make_clip(chunks))
    found = explain(model, processor, make_clip(chunks, gaps=chunks > 1), QUESTION, max_new_tokens=4)
    reading, scope = found.reading, model.config.combiner.scope
    np.testing.assert_allclose(found.cross_attention.sum(axis=(2, 3)), 1, atol=1e-5)
    np.testing.assert_allclose(reading.rollout.sum(axis=(2, 3)) + reading.own, 1, atol=1e-5)
    if reading.last_layer is not None:
        np.testing.assert_allclose(reading.last_layer.sum(axis=(2, 3)) + reading.last_own, 1, atol=1e-5)
    sources = reading.rollout.sum(axis=(1, 3))  # [chunk, source]
    assert (sources[np.triu_indices(chunks, 1)] == 0).all()
    if scope == "chunk" or reading.kind == "concat":
        assert (sources[np.tril_indices(chunks, -1)] == 0).all()
    elif "window" not in name:
        assert (sources[np.tril_indices(chunks)] > 0).all()
    assert reading.rollout.min() >= 0


def follow_stack_by_definition(combiner, tokens, m) -> torch.Tensor:
    """Rollout of all outputs of all layers by dense products, of the weights that the layers give on request."""
    chunks, count = tokens.shape[1:3]
    x = tokens.flatten(1, 2)
    chunk = torch.arange(chunks * count) // count
    mask = chunk[:, None] >= chunk if combiner.scope == "past" else chunk[:, None] == chunk
    if combiner.window is not None:
        mask &= chunk[:, None] - chunk < combiner.window
    rolled = torch.eye(chunks * count)
    for block in combiner.stack.blocks:
        _, weights = block.attention(block.attention_norm(x), None, mask, True)
        rolled = (0.5 * weights[0].mean(dim=0) + 0.5 * torch.eye(len(rolled))) @ rolled
        x = block(x, mask)
    outputs = rolled.unflatten(0, (chunks, count))[:, -m:]
    return outputs.unflatten(2, (chunks, count))


@pytest.mark.parametrize(
    "name", ["transformer", "transformer, a window, audio last", "transformer, gated, one layer", "cls"]
)
@torch.no_grad()
def test_rollout_of_a_stack_is_the_product_of_its_layers(name):
    clip = make_clip(4)
    model, processor, _, features = encode_features(name, clip)
    wanted = follow_stack_by_definition(model.combiner, model.combiner.tokens(*features), model.combiner.m)
    found = explain(model, processor, clip, QUESTION, max_new_tokens=2).reading
    # Places of the sequence by the token that stands there: a marked token must be found at its own number.
    numbers = torch.arange(21.0)[None, None, :, None]
    placed = model.combiner.join(numbers[:, :, :13], numbers[:, :, 13:]).flatten().long()
    by_token = torch.zeros_like(wanted[..., :21])
    by_token[..., placed] = wanted[..., :21]
    np.testing.assert_allclose(found.rollout, by_token, atol=1e-5)
    np.testing.assert_allclose(found.own, wanted[..., 21:].sum(dim=(2, 3)), atol=1e-5)


@pytest.mark.parametrize("name", ["late", "late of a chunk"])
@torch.no_grad()
def test_features_of_late_fusion_read_one_modality_each(name):
    """And x is what the model computes: another picture changes the first half alone, another sound the second."""
    clip = make_clip(4)
    model, processor, _, features = encode_features(name, clip)
    found = explain(model, processor, clip, QUESTION, max_new_tokens=2).reading
    half, tubes = model.combiner.m // 2, features[0].shape[2]
    for weights in (found.rollout, found.last_layer):
        assert (weights[:, :half, :, tubes:] == 0).all()
        assert (weights[:, half:, :, :tubes] == 0).all()
    for tokens, read in zip(
        model.combiner.tokens(*features),
        (found.rollout[:, :half, :, :tubes], found.rollout[:, half:, :, tubes:]),
        strict=True,
    ):
        np.testing.assert_allclose(read, follow_stack_by_definition(model.combiner, tokens, half), atol=1e-5)
    _, x = read_combiner(model.combiner, "late", *features)
    torch.testing.assert_close(x, model.combiner(*features))
    _, other = read_combiner(model.combiner, "late", -features[0], features[1])
    assert torch.equal(other[:, :, half:], x[:, :, half:])
    assert not torch.allclose(other[:, :, :half], x[:, :, :half])


def test_following_back_is_the_product_in_the_order_of_the_layers():
    layers = [torch.rand(5, 5).softmax(-1) for _ in range(3)]
    mixed = torch.eye(5)
    for layer in layers:
        mixed = (0.5 * layer + 0.5 * torch.eye(5)) @ mixed
    torch.testing.assert_close(follow_back(torch.eye(5), layers), mixed)


@torch.no_grad()
def test_memory_of_a_token_turing_machine_is_the_mixture_that_its_weights_say():
    """Each memory is exactly its write weights times memory, features and processed tokens; what it holds of a chunk
    never grows unless that chunk is read."""
    clip = make_clip(4)
    model, processor, _, features = encode_features("ttm", clip)
    combiner, memory = model.combiner, model.combiner.empty_memory(1)
    found = explain(model, processor, clip, QUESTION, max_new_tokens=2).reading.memory
    for chunk, own in enumerate(torch.cat(features, dim=2).unbind(dim=1)):
        inputs = torch.cat([memory, own + combiner.token_position], dim=1)
        read = torch.from_numpy(found.read[chunk]) @ inputs[0]
        torch.testing.assert_close(read, combiner.read(inputs)[0], atol=1e-5, rtol=1e-5)
        written = torch.cat([inputs[0], combiner.process(read[None])[0]])
        _, memory = combiner.process_chunk(own, memory)
        torch.testing.assert_close(torch.from_numpy(found.write[chunk]) @ written, memory[0], atol=1e-5, rtol=1e-4)
    for weights in (found.read, found.write, np.concatenate([found.content, found.empty[..., None]], axis=2)):
        np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-5)
    assert (found.content[np.arange(4), :, np.arange(4)] > 0).all()
    assert all((found.content[chunk, :, chunk + 1 :] == 0).all() for chunk in range(4))
    assert (np.diff(found.empty.mean(axis=1)) < 0).all()


@pytest.mark.parametrize("name", ["transformer", "perceiver of a chunk", "ttm"])
@pytest.mark.parametrize(("video", "audio"), [(True, True), (False, True), (True, False)])
@torch.no_grad()
def test_occlusion_is_what_the_plain_model_says_of_masked_media(name, video, audio):
    """Batched, on features encoded once, equals one clip at a time through the complete model."""
    clip = make_clip(3, video, audio, gaps=video and audio)
    model, processor, media, _ = encode_features(name, clip)
    found = explain(model, processor, clip, QUESTION, answer="a red circle", clips_at_once=3)
    text = processor.encode_text([QUESTION], ["a red circle"])
    labels = text.pop("labels")

    def score(**changed: torch.Tensor) -> float:
        logits = model(**{**media, **changed}, **text).logits[0, :-1]
        chosen = labels[0, 1:] >= 0
        return float(logits.log_softmax(-1)[chosen].gather(1, labels[0, 1:][chosen][:, None]).sum())

    occlusion, passes = found.occlusion, 1
    np.testing.assert_allclose(occlusion.complete, score(), atol=1e-4, rtol=5e-5)
    np.testing.assert_allclose(occlusion.complete, found.token_log_likelihood.sum(), atol=1e-4, rtol=5e-5)
    rows = {"video_mask": occlusion.without_picture, "audio_mask": occlusion.without_sound}
    for mask, values in rows.items():
        for chunk, value in enumerate(values):
            if not media[mask][0, chunk]:
                assert np.isnan(value)
                continue
            changed = media[mask].clone()
            changed[0, chunk] = False
            np.testing.assert_allclose(value, score(**{mask: changed}), atol=1e-4, rtol=5e-5)
            passes += 1
    totals = {"video_mask": occlusion.without_pictures, "audio_mask": occlusion.without_sounds}
    for mask, value in totals.items():
        if media[mask].any():
            np.testing.assert_allclose(value, score(**{mask: torch.zeros_like(media[mask])}), atol=1e-4, rtol=5e-5)
            passes += 1
        else:
            assert np.isnan(value)
    assert occlusion.passes == passes
    assert found.find_decisive_chunk() == int(np.nanmax(occlusion.losses, axis=0).argmax())


@torch.no_grad()
def test_the_answer_is_the_one_that_answering_gives_with_its_probability():
    clip = make_clip(4)
    model, processor, *_ = encode_features("cls", clip)
    found = explain(model, processor, clip, QUESTION)
    [[answer]] = answer_clips(model, processor, [processor.feature_extractor.tensors(clip)], [[QUESTION]])
    assert found.answer == answer.text
    assert np.exp(found.token_log_likelihood.sum()) == pytest.approx(answer.probability, rel=1e-4)
    assert len(found.tokens) == len(found.token_log_likelihood) == found.cross_attention.shape[1]


def test_an_answer_of_nothing_is_explained_too(monkeypatch):
    clip = make_clip(2)
    model, processor, *_ = encode_features("concat", clip)
    ended = torch.tensor([[model.config.eos_token_id]]), torch.zeros(1)
    monkeypatch.setattr("mirasol.explain.compute.decode_greedily", lambda *_, **__: ended)
    found = explain(model, processor, clip, QUESTION)
    assert (found.answer, found.tokens) == ("", (processor.tokenizer.eos_token,))
    assert found.cross_attention.shape[1] == 1


@pytest.mark.parametrize("name", ["transformer", "perceiver", "ttm"])
def test_low_precision_keeps_the_sums(name):
    clip = make_clip(5)
    model, processor, *_ = encode_features(name, clip, "bfloat16")
    found = explain(model, processor, clip, QUESTION, max_new_tokens=3)
    np.testing.assert_allclose(found.reading.rollout.sum(axis=(2, 3)) + found.reading.own, 1, atol=1e-5)
    np.testing.assert_allclose(found.cross_attention.sum(axis=(2, 3)), 1, atol=1e-5)
    assert np.isfinite(found.occlusion.losses).all()


def test_a_long_clip_is_explained_a_few_variants_at_a_time(monkeypatch):
    """However long the clip, no pass has more chunks than allowed."""
    monkeypatch.setattr("mirasol.explain.occlusion.CHUNKS_AT_ONCE", 30)
    clip = make_clip(12)
    model, processor, *_ = encode_features("perceiver of a chunk", clip)
    sizes = []
    hook = model.latent.register_forward_pre_hook(lambda _module, given: sizes.append(given[0].shape[:2]))
    found = explain(model, processor, clip, QUESTION, max_new_tokens=1)
    hook.remove()
    assert found.chunks == 12
    assert found.occlusion.passes == 27
    assert max(rows * chunks for rows, chunks in sizes) == 24


def test_boxes_cover_what_the_encoder_reads():
    """Changing the pixels (mel bands) of a box changes the token's input, those outside it do not."""
    clip = make_clip(1)
    model, processor, *_ = encode_features("transformer", clip)
    found = explain(model, processor, clip, QUESTION, max_new_tokens=1)
    encoder = model.chunk_encoder
    with torch.no_grad():
        video, audio = torch.zeros(1, 4, 3, 32, 32), torch.zeros(1, 16, 64)
        for parts, boxes, empty in ((encoder.tubes, found.tubes, video), (encoder.patches, found.patches, audio)):
            plain = parts(empty)
            for token, box in enumerate(boxes):
                inside = empty.clone()
                slices = [slice(*pair) for pair in box.reshape(-1, 2)]
                if len(slices) == 3:
                    slices.insert(1, slice(None))
                inside[(0, *slices)] = 1
                outside = 1 - inside
                assert not torch.equal(parts(inside)[0, token], plain[0, token])
                torch.testing.assert_close(parts(outside)[0, token], plain[0, token])


def test_bad_questions_are_refused():
    model, processor, *_ = encode_features("concat", make_clip(2))
    for question, answer in ((" ", None), (QUESTION, "")):
        with pytest.raises(UserError, match="is empty"):
            explain(model, processor, make_clip(2), question, answer=answer)


def test_a_combiner_that_cannot_be_explained_is_named():
    model, processor, *_ = encode_features("concat", make_clip(2))
    combiner, model.combiner = model.combiner, torch.nn.Identity()
    try:
        with pytest.raises(UserError, match="'concat'"):
            explain(model, processor, make_clip(2), QUESTION)
    finally:
        model.combiner = combiner
