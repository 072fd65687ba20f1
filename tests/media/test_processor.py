"""Clips and text to model-ready tensors; saving and loading."""

import pytest
import torch
from media_making import Audio, Video, ramp, steady, tone, write_media
from transformers import AutoFeatureExtractor, AutoProcessor

from mirasol import BadClip, Limits, MirasolConfig, MirasolFeatureExtractor, MirasolProcessor, UserError
from mirasol.media.tokenizer import train_tokenizer

TEXTS = ["what comes after the bell?", "which shape is red?", "circle", "low bell", "two"]


@pytest.fixture(scope="module")
def processor() -> MirasolProcessor:
    config = MirasolConfig.preset("tiny")
    return MirasolProcessor(MirasolFeatureExtractor.for_config(config), train_tokenizer(TEXTS, 400), 64)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("clips")
    full = write_media(folder / "full.mp4", Video(ramp(50), steady(50, 25)), Audio([(0, tone(2))]))
    silent = write_media(folder / "silent.mp4", Video(ramp(25), steady(25, 25)))
    sound = write_media(folder / "sound.mp4", Audio([(0, tone(1.5))]))
    return [processor.feature_extractor.read(path) for path in (full, silent, sound)]


def test_compact_form(processor, clips):
    compact = processor.feature_extractor.tensors(clips[0])
    assert compact["video"].shape == (4, 4, 3, 32, 32)
    assert compact["video"].dtype == torch.uint8
    assert compact["audio"].shape == (4, 16, 64)
    assert compact["audio"].dtype == torch.float16
    assert compact["video_mask"].all()
    assert compact["audio_mask"].all()


def test_batch_pads_at_the_end_and_masks_what_is_absent(processor, clips):
    batch = processor(clips)
    assert batch["video"].shape == (3, 4, 4, 3, 32, 32)
    assert batch["video"].dtype == batch["audio"].dtype == torch.float32
    assert batch["chunk_mask"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["video_mask"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["audio_mask"].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]
    for name in ("video", "audio"):
        assert (batch[name][~batch[f"{name}_mask"]] == 0).all()
        assert (batch[name][batch[f"{name}_mask"]] != 0).any()


def test_normalised_video_comes_back_as_pixels(processor, clips):
    extractor = processor.feature_extractor
    batch = extractor(clips[:1])
    assert torch.equal(extractor.pixels(batch["video"])[0], extractor.tensors(clips[0])["video"])


def test_pixels_are_normalised_by_mean_and_deviation(processor):
    extractor = processor.feature_extractor
    video = torch.arange(256, dtype=torch.uint8).repeat(2 * 4 * 3 * 32 * 32 // 256).view(2, 4, 3, 32, 32)
    present = torch.tensor([True, False])
    compact = {"video": video, "audio": torch.zeros(2, 16, 64).half(), "video_mask": present, "audio_mask": present}
    batch = extractor.collate([compact])
    expected = (video[0].double() / 255 - extractor.image_mean) / extractor.image_std
    torch.testing.assert_close(batch["video"][0, 0].double(), expected, atol=1e-6, rtol=0)
    assert (batch["video"][0, 1] == 0).all()


def test_each_channel_may_have_a_mean_and_deviation_of_its_own(processor, clips, tmp_path):
    settings = processor.feature_extractor.to_dict() | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.125]}
    extractor = MirasolFeatureExtractor(**{name: settings[name] for name in MirasolConfig().media_settings()})
    pixels, batch = extractor.tensors(clips[0])["video"], extractor(clips[:1])
    for channel, (mean, deviation) in enumerate(zip((0.5, 0.4, 0.3), (0.25, 0.5, 0.125), strict=True)):
        expected = (pixels[:, :, channel].double() / 255 - mean) / deviation
        torch.testing.assert_close(batch["video"][0, :, :, channel].double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(extractor.pixels(batch["video"])[0], pixels)
    extractor.save_pretrained(tmp_path)
    assert MirasolFeatureExtractor.from_pretrained(tmp_path).image_mean == (0.5, 0.4, 0.3)


def test_limits_reach_the_reader(processor, tmp_path):
    path = write_media(tmp_path / "a.mp4", Video(ramp(25), steady(25, 25)))
    extractor = processor.feature_extractor
    assert extractor.read(path).has_video
    with pytest.raises(BadClip, match=r"scale the video down, or raise it in Python with .*Limits\(max_pixels="):
        extractor.read(path, limits=Limits(max_pixels=64 * 48 - 1))


def test_a_clip_is_the_same_alone_as_in_a_batch(processor, clips):
    batch = processor(clips)
    for row, clip in enumerate(clips):
        alone = processor.feature_extractor(clip)
        chunks = clip.timeline.num_chunks
        for name in alone:
            torch.testing.assert_close(batch[name][row : row + 1, :chunks], alone[name])


def test_cached_compact_form_gives_the_same_batch(processor, clips):
    extractor = processor.feature_extractor
    direct, cached = extractor(clips), extractor.collate([extractor.tensors(clip) for clip in clips])
    assert all(torch.equal(direct[name], cached[name]) for name in direct)


def test_prompts_may_come_with_complete_rows(processor, clips):
    batch = processor(clips[:2], TEXTS[:2], TEXTS[2:4], return_prompts=True)
    alone = processor.encode_text(TEXTS[:2])
    assert torch.equal(batch["prompt_input_ids"], alone["decoder_input_ids"])
    assert torch.equal(batch["prompt_attention_mask"], alone["decoder_attention_mask"])
    assert "prompt_input_ids" not in processor(clips[:2], TEXTS[:2], TEXTS[2:4])


def test_answers_are_decoded_without_their_prompts(processor):
    rows = processor.encode_text(TEXTS[:3], ["low bell", "two", "circle"])
    padded = torch.nn.functional.pad(rows["decoder_input_ids"], (2, 3), value=-100)
    for ids in (rows["decoder_input_ids"], rows["labels"], padded, padded.numpy(), rows["labels"].tolist()):
        assert processor.decode_answers(ids) == ["low bell", "two", "circle"]
    assert processor.decode_answers(processor.encode_text(TEXTS[:3])["decoder_input_ids"]) == ["", "", ""]


def test_decoding_takes_the_keywords_of_the_tokenizer(processor):
    ids = processor.encode_text(["circle"])["decoder_input_ids"]
    for decoded in (
        processor.decode(ids[0], skip_special_tokens=False),
        processor.decode(token_ids=ids[0].tolist(), skip_special_tokens=False),
    ):
        assert decoded.startswith("<bos>") and decoded.endswith("<sep>")
    spaces = {"clean_up_tokenization_spaces": True}
    assert processor.batch_decode(ids, skip_special_tokens=True, **spaces) == processor.batch_decode(ids) == ["circle"]
    assert processor.batch_decode(sequences=ids.numpy(), skip_special_tokens=False)[0].startswith("<bos>")


def test_rows_without_targets_end_in_sep_and_are_padded_at_the_left(processor):
    batch = processor.encode_text(["circle", "what comes after the bell?"])
    ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
    assert (ids[:, -1] == processor.tokenizer.sep_token_id).all()
    assert mask[0, 0] == 0
    assert ids[0, 0] == processor.tokenizer.pad_token_id
    assert ids[0][mask[0].bool()][0] == processor.tokenizer.bos_token_id
    assert "labels" not in batch


def test_rows_with_targets_are_labelled_on_target_and_end_only(processor):
    batch = processor.encode_text(["which shape is red?", "what comes after the bell?"], ["circle", "low bell"])
    ids, labels, mask = batch["decoder_input_ids"], batch["labels"], batch["decoder_attention_mask"].bool()
    for row, target in zip(range(2), ("circle", "low bell"), strict=True):
        learnt = labels[row] != -100
        assert (ids[row][learnt] == labels[row][learnt]).all()
        assert processor.decode(labels[row][learnt]) == target
        assert labels[row][learnt][-1] == processor.tokenizer.eos_token_id
        assert ids[row][~learnt & mask[row]][-1] == processor.tokenizer.sep_token_id
        assert not (learnt & ~mask[row]).any()
    assert mask[:, 0].all(), "padded at the right"


def test_questions_of_a_clip_stay_together(processor, clips):
    batch = processor(clips[:2], [["circle", "two"], ["low bell", "which shape is red?"]])
    assert processor.batch_decode(batch["decoder_input_ids"]) == ["circle", "two", "low bell", "which shape is red?"]
    assert len(batch["video"]) == 2


@pytest.mark.parametrize(
    ("prompts", "targets", "words"),
    [
        ([["circle"], ["two", "circle"]], None, "same number"),
        (["circle"], ["two", "low"], "1 prompts but 2 targets"),
        ([], None, "prompts is empty"),
        (["circle " * 70], None, "exceeds max_text_length=64: shorten 'circle circle"),
        (["circle"], ["two " * 70], "exceeds max_text_length=64"),
    ],
)
def test_text_that_does_not_fit_is_refused_by_name(processor, prompts, targets, words):
    with pytest.raises(UserError, match=words):
        processor.encode_text(prompts, targets)


def test_numbers_of_clips_and_prompts_must_match(processor, clips):
    with pytest.raises(UserError, match="3 prompts for 2 clips"):
        processor(clips[:2], ["circle"] * 3)
    with pytest.raises(UserError, match="nothing to process"):
        processor()
    with pytest.raises(UserError, match="without prompts"):
        processor(clips[:1], targets=["circle"])


def test_paths_are_read(processor, tmp_path):
    with pytest.raises(BadClip, match="no such file"):
        processor(tmp_path / "missing.mp4", "circle")


def test_round_trip_through_auto_processor(processor, tmp_path, clips):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MirasolProcessor)
    assert isinstance(AutoFeatureExtractor.from_pretrained(tmp_path), MirasolFeatureExtractor)
    before, after = (p(clips, [["circle"]] * 3, [["<eos> two"]] * 3) for p in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()


def test_saving_what_was_loaded_writes_the_same_files(processor, tmp_path):
    """Nothing of where it was loaded from, in any number of rounds."""
    processor.save_pretrained(tmp_path / "0")
    for number in (1, 2):
        loaded = MirasolProcessor.from_pretrained(tmp_path / str(number - 1), local_files_only=True)
        loaded.save_pretrained(tmp_path / str(number))
    first, *others = ({f.name: f.read_bytes() for f in (tmp_path / str(n)).iterdir()} for n in range(3))
    assert all(other == first for other in others)
    assert b"local" not in first["tokenizer_config.json"]


def test_the_default_settings_are_those_of_the_tiny_preset():
    plain, tiny = MirasolFeatureExtractor(), MirasolFeatureExtractor.for_config(MirasolConfig.preset("tiny"))
    assert plain.to_dict() == tiny.to_dict()
    assert MirasolConfig.preset("tiny").media_settings().items() <= plain.to_dict().items()


def test_feature_extractor_saves_by_itself(tmp_path):
    MirasolFeatureExtractor(image_size=48, chunk_seconds=None, num_chunks=5).save_pretrained(tmp_path)
    loaded = MirasolFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.image_size, loaded.chunk_seconds, loaded.num_chunks) == (48, None, 5)


@pytest.mark.parametrize(
    "settings", [{"image_sise": 32}, {"fit": "squash"}, {"image_size": 0}, {"chunk_seconds": 0.5, "num_chunks": 3}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError):
        MirasolFeatureExtractor(**settings)


def test_candidates_are_rows_of_answers_after_prompts(processor):
    """One list for all prompts is the same list for each; every candidate ends in <eos>, absent ones are masked."""
    prompts = [["what is it?", "where?"], ["when exactly?", "who?"]]
    shared = processor.candidates(prompts, ["a dog", "cat"])
    lists = [["a dog", "cat"], ["left", "right", "above it"], ["now"], ["nobody", "you"]]
    ragged = processor.candidates(prompts, lists)
    for batch in (shared, ragged):
        text = processor.encode_text(prompts)
        assert torch.equal(batch["decoder_input_ids"], text["decoder_input_ids"])
        assert torch.equal(batch["decoder_attention_mask"], text["decoder_attention_mask"])
        assert batch["candidate_ids"].shape == batch["candidate_mask"].shape
    assert (shared["candidate_ids"] == shared["candidate_ids"][:1]).all()
    assert ragged["candidate_mask"].any(-1).sum(1).tolist() == [2, 3, 1, 2]
    for row, texts in enumerate(lists):
        for place, text in enumerate(texts):
            ids = ragged["candidate_ids"][row, place][ragged["candidate_mask"][row, place]]
            labels = processor.encode_text("x", text)["labels"]
            assert ids.tolist() == labels[labels >= 0].tolist()
            assert ids[-1] == processor.tokenizer.eos_token_id and processor.decode(ids) == text
    assert (ragged["candidate_ids"][~ragged["candidate_mask"]] == processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ([["dog", ""], ["cat"]], "candidate '' of 'what\\?' is empty"),
        ([["dog"], []], "at least one text"),
        ([], "give a list"),
        ("dog", "give a list"),
        ([["dog"]], "2 prompts but 1 lists"),
        ([["dog"], "cat"], "give a list"),
        (["dog", "x" * 400], "exceeds max_text_length"),
    ],
)
def test_candidates_that_cannot_be_scored_are_refused(processor, candidates, said):
    with pytest.raises(UserError, match=said):
        processor.candidates(["what?", "who?"], candidates)
