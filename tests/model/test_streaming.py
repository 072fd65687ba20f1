"""A stream gives after every chunk what one pass over all chunks so far gives, in room that is known."""

import pytest
import torch
from test_combiners import COMBINERS, configured, every_combiner

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.errors import UserError
from mirasol.model.cache import ChunkBuffer

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CHUNKS = 7
WITHOUT_A_PAST = ("transformer of a chunk", "cls of a chunk", "perceiver of a chunk", "concat", "late of a chunk")


def built(name: str) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(configured(name)).eval()


def windowed(name: str, window: int) -> MirasolForConditionalGeneration:
    """The model with the window in its config, so that a pass over all chunks has it too."""
    looks_back = name not in WITHOUT_A_PAST and name != "ttm"
    parts = COMBINERS[name] | ({"window": window} if looks_back else {})
    torch.manual_seed(0)
    config = MirasolConfig.preset("tiny", combiner=parts, latent={"window": window}, text={"vocab_size": 40})
    return MirasolForConditionalGeneration(config).eval()


def media(batch: int = 2, chunks: int = CHUNKS) -> dict[str, torch.Tensor]:
    """Clips in which some chunks lack video, some audio, and one both."""
    generator = torch.Generator().manual_seed(5)
    there = torch.ones(batch, chunks, dtype=torch.bool)
    seen, heard = there.clone(), there.clone()
    seen[0, 1:3], heard[-1, 2:4] = False, False
    return {
        "video": torch.randn(batch, chunks, 4, 3, 32, 32, generator=generator),
        "audio": torch.randn(batch, chunks, 16, 64, generator=generator),
        "chunk_mask": there,
        "video_mask": seen,
        "audio_mask": heard,
    }


def chunk_of(clips: dict[str, torch.Tensor], t: int) -> dict[str, torch.Tensor]:
    return {name: clips[name][:, t] for name in ("video", "audio", "video_mask", "audio_mask")}


def so_far(model, clips: dict[str, torch.Tensor], chunks: int):
    with torch.no_grad():
        return model.encode(**{name: value[:, :chunks] for name, value in clips.items()})


@every_combiner
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stream_is_at_every_moment_the_pass_over_all_so_far(name, batch):
    model, clips = built(name), media(batch)
    stream = model.stream(batch)
    for t in range(CHUNKS):
        stream.append(**chunk_of(clips, t))
        whole = so_far(model, clips, t + 1)
        for key, value in stream.encoder_outputs.items():
            assert value.shape == whole[key].shape
            torch.testing.assert_close(value, whole[key], **TOLERANCE)
        assert stream.chunks == t + 1


@every_combiner
@pytest.mark.parametrize("window", [1, 3])
def test_a_windowed_stream_is_the_end_of_the_windowed_pass(name, window):
    """The window of the stream, that of the config, or both: the same numbers."""
    model, plain, clips = windowed(name, window), built(name), media()
    plain.load_state_dict(model.state_dict())
    streams = [plain.stream(2, window), model.stream(2, window), model.stream(2)]
    for t in range(CHUNKS):
        whole = so_far(model, clips, t + 1)
        for stream, kept in zip(streams, (window, window, CHUNKS), strict=True):
            stream.append(**chunk_of(clips, t))
            given, kept = stream.encoder_outputs, min(t + 1, kept)
            assert given.combined.shape[1] == kept and given.latent_mask.shape == given.last_hidden_state.shape[:2]
            torch.testing.assert_close(given.combined, whole.combined[:, -kept:], **TOLERANCE)
            torch.testing.assert_close(given.latents, whole.latents[:, -kept:], **TOLERANCE)


@pytest.mark.parametrize("name", ["transformer", "cls", "perceiver"])
def test_a_window_cuts_off_what_is_older_layer_by_layer(name):
    """Two layers that see two chunks each know of three, and a window as long as the clip changes nothing."""
    model, wide, clips = windowed(name, 2), windowed(name, CHUNKS), media()
    for other in (wide, plain := built(name)):
        other.load_state_dict(model.state_dict())
    with torch.no_grad():
        seen, heard = (torch.randn(1, CHUNKS, count, 96) for count in (13, 8))
        changed = seen.clone()
        changed[:, 2] += torch.randn_like(changed[:, 2])
        change = (model.combiner(seen, heard) - model.combiner(changed, heard)).abs().amax(dim=(0, 2, 3))
    reach = 2 if name == "perceiver" else 3  # a Perceiver's features stay what they are
    assert ((change > 0) == torch.tensor([2 <= t < 2 + reach for t in range(CHUNKS)])).all()
    torch.testing.assert_close(so_far(wide, clips, CHUNKS).latents, so_far(plain, clips, CHUNKS).latents)


def test_one_modality_may_be_left_out():
    model, clips = built("transformer"), media(1)
    clips["video_mask"][:], clips["audio_mask"][:] = True, True
    clips["audio_mask"][:, 1], clips["video_mask"][:, 2] = False, False
    stream = model.stream()
    stream.append(clips["video"][:, 0], clips["audio"][:, 0])
    stream.append(clips["video"][:, 1], None)
    stream.append(None, clips["audio"][:, 2])
    torch.testing.assert_close(stream.encoder_outputs.latents, so_far(model, clips, 3).latents, **TOLERANCE)


@every_combiner
def test_a_stream_in_bfloat16(name):
    model, clips = built(name).to(torch.bfloat16), media()
    clips = {key: value.bfloat16() if value.is_floating_point() else value for key, value in clips.items()}
    stream = model.stream(2)
    for t in range(4):
        stream.append(**chunk_of(clips, t))
    given, whole = stream.encoder_outputs.latents, so_far(model, clips, 4).latents
    assert given.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(given.float(), whole.float(), dim=-1).min() > 0.99


def test_answers_in_the_middle_of_a_stream_are_those_of_the_clip_so_far():
    """And what was given before stays what it was while the stream goes on, across growth and wrapping round."""
    model, clips = built("transformer"), media(2, 10)
    ids = torch.randint(5, 40, (4, 3))
    settings = {"decoder_input_ids": ids, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for window in (None, 4):
        stream, given = model.stream(2, window), []
        for t in range(10):
            stream.append(**chunk_of(clips, t))
            output = stream.encoder_outputs
            given.append((output, output.last_hidden_state.clone()))
            if window is None and t in (0, 4):
                expected = {name: value[:, : t + 1] for name, value in clips.items()}
                assert torch.equal(
                    model.generate(encoder_outputs=output, **settings), model.generate(**expected, **settings)
                )
                with torch.no_grad():
                    logits = model(encoder_outputs=output, decoder_input_ids=ids).logits
                    whole = model(**expected, decoder_input_ids=ids).logits
                torch.testing.assert_close(logits, whole, **TOLERANCE)
        assert all(torch.equal(output.last_hidden_state, copy) for output, copy in given)


def test_each_chunk_is_encoded_once():
    model, clips = built("transformer"), media()
    calls = []
    hook = model.chunk_encoder.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[:2]))
    stream = model.stream(2)
    for t in range(3):
        stream.append(**chunk_of(clips, t))
        for _ in range(2):
            model.generate(
                encoder_outputs=stream.encoder_outputs, decoder_input_ids=torch.ones(2, 1).long(), max_new_tokens=2
            )
    hook.remove()
    assert calls == [(2, 1)] * 3


# State


def test_the_state_is_constant_with_a_window_and_grows_with_the_chunks_without():
    def sizes(name, window, chunks=9):
        stream, found = built(name).stream(1, window), []
        for _ in range(chunks):
            stream.append(torch.zeros(1, 4, 3, 32, 32), torch.zeros(1, 16, 64))
            found.append(stream.state_bytes)
        return found

    for name in COMBINERS:
        found = sizes(name, 4)
        assert all(size == found[3] for size in found[3:]), name
    ttm = [size["combiner"] for size in sizes("ttm", None)]
    assert set(ttm) == {6 * 96 * 4}
    for name in WITHOUT_A_PAST:
        assert sizes(name, None)[-1]["combiner"] == 0
    # 2 layers, keys and values of 96 features in fp32: the Combiner keeps those of 21 tokens a chunk, the latent model
    # those of m = 8; rooms for 4, 8, 16, 32, 64 chunks; h and x besides.
    found = sizes("transformer", None, 33)
    for t, room in ((1, 4), (4, 4), (5, 8), (9, 16), (33, 64)):
        layers = 2 * 2 * 96 * 4 * room
        assert found[t - 1] == {"combiner": 21 * layers, "latent": 8 * layers, "latents": 8 * layers // 2}


def test_a_buffer_moves_nothing_but_when_it_grows():
    for window, rooms in ((None, 5), (6, 2), (3, 1)):
        buffer, places = ChunkBuffer(window), []
        for t in range(40):
            seen = buffer.append(torch.full((2, 1, 5, 3), float(t)), passing=torch.full((2, 1, 2, 3), -1.0))
            kept = list(range(40))[: t + 1][-(window or 40) :]
            assert sorted(seen[0, 0, :, 0].tolist()) == sorted([-1.0] * 2 + [float(k) for k in kept for _ in range(5)])
            assert buffer.in_order()[1, 0, ::5, 2].tolist() == kept
            if not places or places[-1] != seen.data_ptr():
                places.append(seen.data_ptr())
        assert len(places) == rooms


# Work


# What is refused


def test_what_cannot_be_streamed_is_refused():
    model, clips = built("transformer"), media()
    chunk = chunk_of(clips, 0)
    with pytest.raises(UserError, match="batch=0"):
        model.stream(0)
    with pytest.raises(UserError, match="window=0"):
        model.stream(1, 0)
    stream = model.stream(2)
    with pytest.raises(UserError, match="append a chunk"):
        _ = stream.encoder_outputs
    with pytest.raises(UserError, match=r"video of shape \(1, 4, 3, 32, 32\)"):
        stream.append(**chunk | {"video": chunk["video"][:1]})
    with pytest.raises(UserError, match=r"audio of shape \(2, 8, 64\)"):
        stream.append(**chunk | {"audio": chunk["audio"][:, :8]})
    with pytest.raises(UserError, match=r"audio_mask of shape \(1,\)"):
        stream.append(**chunk | {"audio_mask": chunk["audio_mask"][:1]})
    assert stream.chunks == 0
    model.train()
    with pytest.raises(UserError, match="training mode"):
        stream.append(**chunk)
    with pytest.raises(UserError, match="training mode"):
        model.stream()


@pytest.mark.parametrize("parts", [{"kind": "ttm"}, {"kind": "concat", "m": 21}, {"scope": "chunk"}])
def test_a_window_over_no_past_is_refused(parts):
    with pytest.raises(UserError, match=r"combiner\.window=4"):
        MirasolConfig.preset("tiny", combiner=parts | {"window": 4})


@pytest.mark.parametrize("part", ["combiner", "latent"])
def test_a_window_of_nothing_is_refused(part):
    with pytest.raises(UserError, match=rf"{part}\.window=0"):
        MirasolConfig.preset("tiny", **{part: {"window": 0}})


def attending(window: int | None) -> MirasolForConditionalGeneration:
    """A model whose texts attend to the last chunks alone; its weights are those of `built("transformer")`."""
    config = MirasolConfig.preset("tiny", text={"vocab_size": 40, "window": window})
    model = MirasolForConditionalGeneration(config).eval()
    model.load_state_dict(built("transformer").state_dict())
    return model


def test_texts_attend_to_the_last_chunks_alone_in_a_pass_and_in_a_stream():
    model, every, clips = attending(3), attending(None), media()
    rows = {"decoder_input_ids": torch.randint(5, 40, (4, 3), generator=torch.Generator().manual_seed(1))}
    stream = model.stream(2)
    for t in range(CHUNKS):
        stream.append(**chunk_of(clips, t))
        so_far_clips = {name: value[:, : t + 1] for name, value in clips.items()}
        with torch.no_grad():
            whole, told = model(**so_far_clips, **rows), model(encoder_outputs=stream.encoder_outputs, **rows)
            free = every(**so_far_clips, **rows)
        torch.testing.assert_close(told.logits, whole.logits, **TOLERANCE)
        assert torch.equal(whole.latents, free.latents)
        assert torch.equal(whole.logits, free.logits) == (t < 3)
    assert stream.state_bytes["latents"] == 2 * 2 * 3 * model.config.combiner.m * 96 * 4  # h and x of 2 clips, fp32


def test_the_last_chunks_of_a_padded_clip_are_its_own():
    model, clips = attending(3), media()
    clips["chunk_mask"][0, 4:] = False
    marked = so_far(model, clips, CHUNKS).latent_mask.unflatten(1, (CHUNKS, -1))
    assert marked.all(-1).equal(marked.any(-1))
    assert marked[0, :, 0].nonzero().flatten().tolist() == [1, 2, 3]
    assert marked[1, :, 0].nonzero().flatten().tolist() == [4, 5, 6]
    clips["chunk_mask"][0, 1:] = False
    assert so_far(model, clips, CHUNKS).latent_mask[0].sum() == model.config.combiner.m
