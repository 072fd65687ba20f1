import shutil
from collections import Counter

import pytest
from untrained import only_stream

from mirasol import UserError
from mirasol.data.datasets.folder_reader import read_examples
from mirasol.data.example import group_by_clip
from mirasol.evaluation.controls import CONTROLS
from mirasol.evaluation.evaluate import DecodedClips, evaluate
from mirasol.evaluation.protocol import evaluate_with_controls


class Counting(DecodedClips):
    """Counts how often each clip is asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loads = Counter()

    def load(self, media, start=None, end=None):
        self.loads[media] += 1
        return super().load(media, start, end)


@pytest.fixture(scope="module")
def results(loaded, clips, shapes):
    return evaluate_with_controls(loaded.model, loaded.processor, clips, shapes)


def test_answers_do_not_depend_on_the_batch_size(loaded, clips, shapes, results):
    single = evaluate(loaded.model, loaded.processor, clips, shapes, clips_per_batch=1)
    pairs = evaluate(loaded.model, loaded.processor, clips, shapes, clips_per_batch=2)
    assert single.answers == pairs.answers == results.test.answers


def test_every_question_is_asked_once_and_in_order(clips, results):
    asked = [answered.example for answered in results.test.answers]
    assert asked == [example for clip in clips for example in clip.examples]
    assert results.test.n == results.chance.n == len(asked)


def test_all_controls_are_run_on_the_same_questions(results):
    assert results.controls.keys() == CONTROLS.keys()
    for control in results.controls.values():
        assert [a.example for a in control.answers] == [a.example for a in results.test.answers]
        assert control.by_type.keys() == results.test.by_type.keys()
    changed = [[a.answer for a in control.answers] for control in results.controls.values()]
    assert all(answers != [a.answer for a in results.test.answers] for answers in changed)


def test_a_control_is_what_a_file_without_the_stream_gives(loaded, clips, shapes, tmp_path):
    clip = clips[0]
    only_stream("video", shapes / clip.media, tmp_path / clip.media)
    controlled = evaluate(loaded.model, loaded.processor, [clip], shapes, control="no_audio")
    assert evaluate(loaded.model, loaded.processor, [clip], tmp_path).answers == controlled.answers


def test_the_cache_is_asked_once_per_clip_and_pass(loaded, clips, shapes):
    cache = Counting(loaded.processor.feature_extractor, shapes)
    evaluate(loaded.model, loaded.processor, clips, shapes, cache=cache)
    assert cache.loads == {clip.media: 1 for clip in clips}


def test_the_model_comes_back_in_the_mode_it_was_in(loaded, clips, shapes):
    for training in (True, False):
        loaded.model.train(training)
        evaluate(loaded.model, loaded.processor, clips[:1], shapes)
        assert loaded.model.training is training


def test_the_model_comes_back_in_its_mode_from_an_error_too(loaded, clips, shapes):
    def stop(done, total):
        raise KeyboardInterrupt

    loaded.model.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(loaded.model, loaded.processor, clips[:1], shapes, progress=stop)
        assert loaded.model.training
    finally:
        loaded.model.eval()


def test_an_unreadable_clip_is_left_out_and_listed(loaded, clips, shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    broken = clips[1]
    (root / broken.media).write_bytes(b"not a film")
    (root / clips[2].media).unlink()
    seen = []
    result = evaluate(
        loaded.model, loaded.processor, clips, root, clips_per_batch=2, progress=lambda *numbers: seen.append(numbers)
    )
    assert [(clip.media, clip.questions) for clip in result.unusable] == [
        (clip.media, len(clip.examples)) for clip in clips[1:]
    ]
    assert all(clip.reason for clip in result.unusable)
    assert result.n == len(clips[0].examples)
    assert seen == [(2, 3), (3, 3)]


def test_no_usable_clip_is_a_result_too(loaded, clips, tmp_path):
    results = evaluate_with_controls(loaded.model, loaded.processor, clips, tmp_path)
    assert results.test.n == 0
    assert len(results.test.unusable) == len(clips)
    assert "cannot be read" in results.table()


def test_windows_of_a_file_are_clips_of_their_own(loaded, shapes):
    slots = [example for example in read_examples(shapes, "train") if example.start is not None][:3]
    result = evaluate(loaded.model, loaded.processor, group_by_clip(slots), shapes)
    assert [answered.example for answered in result.answers] == slots


def test_the_table_has_a_row_for_each_type_and_a_column_for_each_score(results):
    lines = results.table().splitlines()
    assert len(lines) == 1 + len(results.test.by_type) + 2
    assert len({len(line) for line in lines[:-1]}) == 1
    for heading in ("test", "chance", "no video", "no audio", "no media", "shifted audio"):
        assert heading in lines[0]


def test_an_unknown_control_is_refused(loaded, clips, shapes):
    with pytest.raises(UserError, match="no_smell"):
        evaluate(loaded.model, loaded.processor, clips, shapes, control="no_smell")
