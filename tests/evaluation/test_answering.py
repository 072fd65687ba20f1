import pytest
import torch

from mirasol import MirasolProcessor
from mirasol.evaluation.answer import AnswerStreamer, answer_clips, attention_by_chunk


@pytest.fixture(scope="module")
def prompts(clips):
    """Different numbers of questions for different clips."""
    return [[example.prompt for example in clip.examples][: 2 + place] for place, clip in enumerate(clips)]


@pytest.fixture(scope="module")
def alone(loaded, tensors, prompts):
    """Every question by itself: one clip, one prompt, nothing padded."""
    return [
        [answer_clips(loaded.model, loaded.processor, [clip], [[prompt]])[0][0] for prompt in questions]
        for clip, questions in zip(tensors, prompts, strict=True)
    ]


def test_answers_are_those_of_every_question_by_itself(loaded, tensors, prompts, alone):
    assert answer_clips(loaded.model, loaded.processor, tensors, prompts) == alone
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
    assert long.startswith(short)


def test_streamed_pieces_add_up_to_the_answer(loaded, tensors, prompts):
    pieces = []
    streamer = AnswerStreamer(loaded.processor, pieces.append)
    [[answer]] = answer_clips(loaded.model, loaded.processor, tensors[:1], [prompts[0][:1]], streamer=streamer)
    assert "".join(pieces).strip() == answer
    assert len(pieces) > 1


class BytePerToken(MirasolProcessor):
    """Stands for a processor whose tokens are single bytes."""

    def __init__(self):
        pass

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_character_is_streamed_whole():
    pieces = []
    streamer = AnswerStreamer(BytePerToken(), pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in "é!".encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert pieces == ["é", "!"]


def test_attention_is_a_share_for_every_chunk(loaded, tensors, prompts):
    attention = attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0], ["red"] * len(prompts[0]))
    assert attention.shape == (len(prompts[0]), len(tensors[0]["video_mask"]))
    assert (attention >= 0).all()
    assert torch.allclose(attention.sum(1), torch.ones(len(attention)), atol=1e-5)


def test_attention_of_an_answer_cut_within_a_character_is_that_of_its_characters(loaded, tensors, prompts):
    cut, whole = (
        attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0][:1], [answer])
        for answer in ("red" + "\ufffd" * 30, "red")
    )
    assert torch.equal(cut, whole)


def test_attention_does_not_depend_on_the_other_questions(loaded, tensors, prompts):
    answers = ["red", "a much longer answer than that"]
    together = attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0][:2], answers)
    single = attention_by_chunk(loaded.model, loaded.processor, tensors[0], prompts[0][:1], answers[:1])
    assert torch.allclose(together[:1], single, atol=1e-5)
