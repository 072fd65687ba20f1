import shutil
from collections import Counter

import pytest
import torch
from untrained import only_stream

from mirasol import MirasolProcessor
from mirasol.data.clip_cache import ClipCache
from mirasol.data.datasets.folder import read_examples
from mirasol.data.example import group_by_clip
from mirasol.evaluation.answer import (
    AnswerSettings,
    AnswerStreamer,
    answer_clips,
    answer_in_batches,
    compute_attention_by_chunk,
    decode_greedily,
    encode_clips,
    eval_mode,
    load_clip,
    make_clip_key,
)
from mirasol.evaluation.controls import CONTROLS


@pytest.fixture(scope="module")
def prompts(clips):
    """Different numbers of questions for different clips."""
    return [[example.prompt for example in clip.examples][: 2 + place] for place, clip in enumerate(clips)]


@pytest.fixture(scope="module")
def alone(loaded, tensors, prompts):
    """Every question by itself: one clip, one prompt, nothing padded."""
    return [
        [answer_clips(loaded.model, loaded.processor, [clip], [[prompt]])[0][0].text for prompt in questions]
        for clip, questions in zip(tensors, prompts, strict=True)
    ]


def test_answers_are_those_of_every_question_by_itself(loaded, tensors, prompts, alone):
    together = answer_clips(loaded.model, loaded.processor, tensors, prompts)
    assert [[answer.text for answer in row] for row in together] == alone
    assert len({answer for answers in alone for answer in answers}) > 1, "a model that says one thing proves nothing"


def test_clips_are_encoded_once_whatever_the_number_of_questions(loaded, tensors, prompts, monkeypatch):
    seen = []
    encode = loaded.model.encode
    monkeypatch.setattr(loaded.model, "encode", lambda **media: seen.append(len(media["video"])) or encode(**media))
    answer_clips(loaded.model, loaded.processor, tensors, prompts)
    assert seen == [len(tensors)]


def test_a_longer_limit_only_goes_on_where_a_shorter_one_stopped(loaded, tensors, prompts):
    [[short]] = answer_clips(loaded.model, loaded.processor, tensors[:1], [prompts[0][:1]], max_new_tokens=3)
    [[long]] = answer_clips(loaded.model, loaded.processor, tensors[:1], [prompts[0][:1]], max_new_tokens=9)
    assert long.text.startswith(short.text)
    assert long.probability <= short.probability


def test_streamed_pieces_add_up_to_the_answer(loaded, tensors, prompts):
    pieces = []
    streamer = AnswerStreamer(loaded.processor, pieces.append)
    [[answer]] = answer_clips(loaded.model, loaded.processor, tensors[:1], [prompts[0][:1]], streamer=streamer)
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 1


@pytest.mark.parametrize("limit", [1, 3, 12])
def test_answers_are_those_of_generate_and_have_their_probability(loaded, tensors, prompts, limit):
    """Prompts of different lengths, several for each clip, answers that end and such that are cut off."""
    model, processor = loaded.model, loaded.processor
    rows = [row[:2] for row in prompts]
    encoded = encode_clips(model, processor, tensors)
    text = processor.encode_text([prompt for row in rows for prompt in row])
    how = {"do_sample": False, "max_new_tokens": limit, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        found = model.generate(encoder_outputs=encoded, **text, **how)
        ids, total = decode_greedily(model, encoded, **text, max_new_tokens=limit)
    expected = found.sequences[:, text["decoder_input_ids"].shape[1] :]
    assert torch.equal(ids, expected)
    chosen = torch.stack(found.logits, dim=1).log_softmax(-1).gather(-1, expected[..., None])[..., 0]
    counted = (expected == model.config.eos_token_id).cumsum(1) - (expected == model.config.eos_token_id).int() == 0
    assert torch.allclose(total, (chosen * counted).sum(1), atol=1e-4)
    answers = [answer for row in answer_clips(model, processor, tensors, rows, max_new_tokens=limit) for answer in row]
    assert [answer.probability for answer in answers] == pytest.approx(total.exp().tolist(), rel=1e-3)


def test_the_probability_of_an_answer_that_ended_is_its_score_as_a_candidate(loaded, tensors, prompts):
    model, processor = loaded.model, loaded.processor
    encoded = encode_clips(model, processor, tensors[:1])
    text = processor.encode_text(prompts[0][:1])
    with torch.inference_mode():
        ids, total = decode_greedily(model, encoded, **text, max_new_tokens=4)
        end = torch.full((1, 1), model.config.eos_token_id)
        candidate = torch.cat([ids, end], dim=1)[:, None] if ids[0, -1] != end else ids[:, None]
        scores = model.score(encoded, **text, candidate_ids=candidate, candidate_mask=torch.ones_like(candidate).bool())
        shorter = decode_greedily(model, encoded, **text, max_new_tokens=3)[1]
    assert scores.total[0, 0] <= total[0] + 1e-4 <= shorter[0] + 2e-4


class BytePerToken(MirasolProcessor):
    """Stands for a processor whose tokens are single bytes."""

    def __init__(self):
        pass

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_character_is_streamed_whole():
    pieces = []
    streamer = AnswerStreamer(BytePerToken(), pieces.append)
    for byte in "é!".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert pieces == ["é", "!"]


def test_attention_is_a_share_for_every_chunk(loaded, tensors, prompts):
    attention = compute_attention_by_chunk(
        loaded.model, loaded.processor, tensors[0], prompts[0], ["red"] * len(prompts[0])
    )
    assert attention.shape == (len(prompts[0]), len(tensors[0]["video_mask"]))
    assert (attention >= 0).all()
    assert torch.allclose(attention.sum(1), torch.ones(len(attention)), atol=1e-5)


def test_attention_of_an_answer_cut_within_a_character_is_that_of_its_characters(loaded, tensors, prompts):
    cut, whole = (
        compute_attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0][:1], [answer])
        for answer in ("red" + "\ufffd" * 30, "red")
    )
    assert torch.equal(cut, whole)


def test_attention_does_not_depend_on_the_other_questions(loaded, tensors, prompts):
    answers = ["red", "a much longer answer than that"]
    together = compute_attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0][:2], answers)
    single = compute_attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0][:1], answers[:1])
    assert torch.allclose(together[:1], single, atol=1e-5)


@pytest.fixture(scope="module")
def answered(loaded, clips, shapes):
    """The rows of all test clips under every control."""
    settings = AnswerSettings(shapes, tuple(CONTROLS), score_candidates=False, clips_per_batch=2)
    return [row for batch in answer_in_batches(loaded, clips, settings) for row in batch]


def answer_one(loaded, clip, root, controls=()):
    [[row]] = answer_in_batches(loaded, [clip], AnswerSettings(root, controls, score_candidates=False))
    return row


def test_every_question_is_asked_once_and_in_order_under_every_control(clips, answered):
    assert [row["clip"] for row in answered] == [make_clip_key(clip) for clip in clips]
    for clip, row in zip(clips, answered, strict=True):
        assert row["answered"].keys() == {"test", *CONTROLS}
        assert all(list(own) == [example.id for example in clip.examples] for own in row["answered"].values())
    changed = {name: [row["answered"][name] for row in answered] for name in ("test", *CONTROLS)}
    assert all(changed[name] != changed["test"] for name in CONTROLS), "a control without effect proves nothing"


def test_a_control_is_what_a_file_without_the_stream_gives(loaded, clips, shapes, tmp_path):
    clip = clips[0]
    only_stream("video", shapes / clip.media, tmp_path / clip.media)
    controlled = answer_one(loaded, clip, shapes, ("no_audio",))
    assert answer_one(loaded, clip, tmp_path)["answered"]["test"] == controlled["answered"]["no_audio"]


def test_a_clip_is_decoded_once_for_all_controls(loaded, clips, shapes, monkeypatch):
    loads = Counter()

    def counted(extractor, root, clip):
        loads[clip.media] += 1
        return load_clip(extractor, root, clip)

    monkeypatch.setattr("mirasol.evaluation.answer.load_clip", counted)
    settings = AnswerSettings(shapes, tuple(CONTROLS), score_candidates=False, clips_per_batch=1, max_new_tokens=1)
    list(answer_in_batches(loaded, clips, settings))
    assert loads == {clip.media: 1 for clip in clips}


def test_clips_that_a_cache_keeps_have_the_same_answers_and_are_decoded_once(
    loaded, clips, shapes, tmp_path, monkeypatch
):
    decoded = Counter()
    decode = ClipCache._decode_and_keep
    monkeypatch.setattr(
        ClipCache, "_decode_and_keep", lambda self, window: decoded.update([window[0]]) or decode(self, window)
    )
    wanted = [{"score_candidates": False, "max_new_tokens": 3, "cache": cache} for cache in (None, tmp_path, tmp_path)]
    plain, first, second = (list(answer_in_batches(loaded, clips, AnswerSettings(shapes, **one))) for one in wanted)
    assert plain == first == second
    assert decoded == {clip.media: 1 for clip in clips}


def test_an_unreadable_clip_has_a_reason_with_a_cache_too(loaded, clips, tmp_path):
    (tmp_path / "data" / clips[1].media).parent.mkdir(parents=True)
    (tmp_path / "data" / clips[1].media).write_bytes(b"not a film")
    settings = AnswerSettings(tmp_path / "data", score_candidates=False, cache=tmp_path / "cache")
    [rows] = answer_in_batches(loaded, clips[:2], settings)
    assert all(row["reason"] and "answered" not in row for row in rows)


def test_segments_of_a_file_are_clips_of_their_own(loaded, shapes):
    segments = [example for example in read_examples(shapes, "train") if example.start is not None][:3]
    groups = group_by_clip(segments)
    [rows] = answer_in_batches(loaded, groups, AnswerSettings(shapes, score_candidates=False, max_new_tokens=2))
    assert [row["clip"][1:] for row in rows] == [[clip.start, clip.end] for clip in groups]
    assert [id for row in rows for id in row["answered"]["test"]] == [example.id for example in segments]


def test_an_unreadable_clip_has_a_reason_and_counts_as_done(loaded, clips, shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    (root / clips[1].media).write_bytes(b"not a film")
    (root / clips[2].media).unlink()
    reported = []
    settings = AnswerSettings(root, score_candidates=False, clips_per_batch=2, max_new_tokens=2)
    batches = answer_in_batches(loaded, clips, settings, progress=lambda *numbers: reported.append(numbers))
    rows = [row for batch in batches for row in batch]
    assert ["reason" in row for row in rows] == [False, True, True]
    assert all(row["reason"] and "answered" not in row for row in rows[1:])
    assert reported == [(2, 3), (3, 3)]


def test_the_model_comes_back_in_the_mode_it_was_in(loaded, clips, shapes):
    for training in (True, False):
        loaded.model.train(training)
        list(answer_in_batches(loaded, clips[:1], AnswerSettings(shapes, score_candidates=False, max_new_tokens=1)))
        assert loaded.model.training is training


def test_the_model_comes_back_in_its_mode_from_an_error_too(loaded):
    loaded.model.train()
    try:
        context = eval_mode(loaded.model)
        context.__enter__()
        assert not loaded.model.training
        assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None), "errors pass"
        assert loaded.model.training
    finally:
        loaded.model.eval()
