"""Questions that are answered together get the answers that they get alone."""

import queue
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mirasol.app.server.answerer import Answerer, Stopping
from mirasol.app.server.questions import Choosing, Question, find_stop, hold_back
from mirasol.checkpoint import Loaded, load_answerer
from mirasol.evaluation.answer import answer_encoded, encode_clips

PROMPTS = [
    "what colour is the circle?",
    "which shape is seen last?",
    "what plays?",
    "which sound comes after the bell?\nwhistle\nand which shape is seen then?",
]


@pytest.fixture(scope="module")
def loaded(untrained) -> Loaded:
    """Random weights: their answers are long, and unlike each other."""
    return load_answerer(untrained)


@pytest.fixture(scope="module")
def encoded(loaded):
    """Clips of 1 to 30 chunks, some without sound."""
    made = []
    for chunks in (1, 2, 7, 30):
        draw = torch.Generator().manual_seed(chunks)
        clip = {
            "video": torch.randint(0, 256, (chunks, 4, 3, 32, 32), dtype=torch.uint8, generator=draw),
            "audio": torch.randn(chunks, 16, 64, generator=draw).half(),
            "video_mask": torch.ones(chunks, dtype=torch.bool),
            "audio_mask": torch.arange(chunks) % 3 != 2,
        }
        made.append(encode_clips(loaded.model, loaded.processor, [clip]))
    return made


def ask(answerer, encoded, prompt, choosing, delay=lambda: None):
    """Asks, and returns the question with its text and pieces."""
    pieces = queue.Queue()
    ids = answerer.processor.encode_text([prompt])["decoder_input_ids"][0].tolist()
    question = Question(encoded, ids, choosing, answerer.processor, pieces.put)
    delay()
    answerer.ask(question)
    found = []
    while not found or found[-1].reason is None:
        found.append(pieces.get(timeout=60))
        if found[-1].error is not None:
            raise found[-1].error
    return question, "".join(piece.text for piece in found), found


def test_answers_do_not_depend_on_what_is_answered_with_them(loaded, encoded):
    """Joining and leaving at all moments, over clips of all lengths."""
    draw = random.Random(5)
    asked = [(draw.choice(encoded), draw.choice(PROMPTS), draw.choice([1, 2, 5, 24])) for _ in range(40)]
    alone = [answer_encoded(loaded.model, loaded.processor, *each) for each in asked]
    answerer = Answerer(loaded, max_batch=5)
    try:
        with ThreadPoolExecutor(12) as pool:
            jobs = [pool.submit(ask, answerer, clip, prompt, Choosing(most)) for clip, prompt, most in asked]
            together = [job.result() for job in jobs]
    finally:
        answerer.close()
    assert [text for _, text, _ in together] == [answer.text for answer in alone]
    for (question, _, _), answer in zip(together, alone, strict=True):
        assert question.probability == pytest.approx(answer.probability, rel=1e-4)
    assert answerer.stepped_rows > 1.5 * answerer.steps  # they were together


def test_drawn_answers_are_those_of_their_seed(loaded, encoded):
    choosings = [Choosing(12, temperature=1.0, top_p=top_p, seed=seed) for seed in range(4) for top_p in (1.0, 0.5)]
    answerer = Answerer(loaded, max_batch=8)
    try:
        alone = [ask(answerer, encoded[2], PROMPTS[0], choosing)[1] for choosing in choosings]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(ask, answerer, encoded[2], PROMPTS[0], choosing) for choosing in choosings]
            together = [job.result()[1] for job in jobs]
        greedy = ask(answerer, encoded[2], PROMPTS[0], Choosing(12))[1]
        nearly = ask(answerer, encoded[2], PROMPTS[0], Choosing(12, temperature=1e-300, seed=1))[1]
        narrow = ask(answerer, encoded[2], PROMPTS[0], Choosing(12, temperature=2.0, top_p=1e-9, seed=1))[1]
    finally:
        answerer.close()
    assert together == alone
    assert len(set(alone)) > 4
    assert greedy == nearly == narrow


def test_pieces_make_the_text_and_end_before_a_stop(loaded, encoded):
    answerer = Answerer(loaded)
    try:
        _, whole, pieces = ask(answerer, encoded[1], PROMPTS[1], Choosing(24))
        assert len(pieces) > 3 and sum(len(piece.tokens) for piece in pieces) <= 24
        middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
        _, cut, pieces = ask(answerer, encoded[1], PROMPTS[1], Choosing(24, stop=("no such text", middle)))
    finally:
        answerer.close()
    assert cut == whole[: whole.index(middle)].strip()
    assert pieces[-1].reason == "stop"


def test_stops_are_found_and_held_back():
    assert find_stop("red and blue", ("blue", "and")) == 4
    assert find_stop("red", ("blue",)) is None
    assert hold_back("red an", ("and",)) == "red"
    assert hold_back("red ", ()) == "red"
    assert hold_back("caf\ufffd", ()) == ""
    assert hold_back("red", ("and",)) == "red"


def test_cancelled_questions_leave_and_failures_hurt_only_their_own(loaded, encoded, monkeypatch):
    answerer = Answerer(loaded, max_batch=4)
    try:
        pieces = queue.Queue()
        ids = loaded.processor.encode_text([PROMPTS[0]])["decoder_input_ids"][0].tolist()
        left = Question(encoded[0], ids, Choosing(10**6), loaded.processor, pieces.put)
        answerer.ask(left)
        pieces.get(timeout=60)
        left.is_cancelled = True
        assert ask(answerer, encoded[0], PROMPTS[1], Choosing(4))[1]
        assert not answerer.run(lambda: left in answerer.batch.questions).result(60)
        broken = Question(encoded[0], [10**9], Choosing(4), loaded.processor, pieces.put)
        while not pieces.empty():
            pieces.get()
        answerer.ask(broken)
        assert isinstance(pieces.get(timeout=60).error, IndexError)
        assert answerer.run(lambda: 3).result(60) == 3
        with pytest.raises(ZeroDivisionError):
            answerer.run(lambda: 1 // 0).result(60)
        assert ask(answerer, encoded[0], PROMPTS[1], Choosing(4))[1]
    finally:
        answerer.close()
    with pytest.raises(Stopping):
        answerer.run(lambda: 3)
