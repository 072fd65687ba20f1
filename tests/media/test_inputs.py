"""What users have in place of a file: frames and samples in memory, values of `datasets`, conversations."""

import fractions
from dataclasses import dataclass, replace

import av
import numpy as np
import PIL.Image
import pytest
import torch
from media_making import Audio, Video, number_of, ramp, steady, tone, write_media

from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolProcessor, UserError
from mirasol.media.tokenizer import train_tokenizer

TEXTS = ["what comes after the bell?", "which shape is red?", "circle", "low bell", "two"]
MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
UNTIDY = [0.0, 0.07, 0.11, 0.3, 0.34, 0.9, 0.95, 1.0, 1.31, 1.5]


@pytest.fixture(scope="module")
def processor() -> MirasolProcessor:
    config = MirasolConfig.preset("tiny")
    return MirasolProcessor(MirasolFeatureExtractor.for_config(config), train_tokenizer(TEXTS, 400))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    both = write_media(folder / "both.mp4", Video(ramp(50), steady(50, 25)), Audio([(0, tone(2))]))
    return {
        "both": both,
        "sound": write_media(folder / "sound.wav", Audio([(0, tone(2, 16_000))], 16_000, "pcm_s16le")),
    }


def write_lossless(path, pictures, times) -> None:
    """A file whose frames are the pictures to the bit, at any times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "bgr0"
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("times", [steady(30, 20), UNTIDY], ids=["steady", "untidy"])
@pytest.mark.parametrize("size", [(48, 64), (30, 20), (100, 33)])
def test_frames_in_memory_are_read_as_a_file_of_them_is(fit, times, size, tmp_path):
    pictures = [np.random.default_rng(n).integers(0, 255, (*size, 3), np.uint8) for n in range(len(times))]
    write_lossless(tmp_path / "clip.mkv", pictures, times)
    extractor = MirasolFeatureExtractor(fit=fit, image_size=32)
    expected = extractor.read(tmp_path / "clip.mkv")
    clip = extractor.make_clip({"video": np.stack(pictures), "times": times})
    chunks = min(clip.timeline.num_chunks, expected.timeline.num_chunks)
    assert abs(clip.timeline.num_chunks - expected.timeline.num_chunks) <= 1  # the length of a last frame is a guess
    count = 4 * chunks
    assert (clip.frame_times[:count] - expected.frame_times[:count]).abs().max() < 2e-3
    assert torch.equal(clip.frames[:count], expected.frames[:count])
    assert torch.equal(clip.video_present[:chunks], expected.video_present[:chunks])


def test_every_form_of_frames_is_the_same_clip(processor):
    extractor, frames = processor.feature_extractor, np.stack(ramp(20))
    expected = extractor.make_clip({"video": frames, "fps": 10})
    assert [number_of(frame) for frame in expected.frames] == [5 * t + n for t in range(4) for n in (0, 1, 3, 4)]
    first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    for video in (list(frames), first, first.float() / 255, (frames / 255).astype(np.float64), pictures, list(first)):
        clip = extractor.make_clip({"video": video, "fps": 10})
        assert torch.equal(clip.frames, expected.frames) and torch.equal(clip.frame_times, expected.frame_times)
    timed = extractor.make_clip({"video": frames, "times": [n / 10 for n in range(20)]})
    assert torch.equal(timed.frames, expected.frames)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_every_form_of_samples_is_the_same_sound(processor, rate):
    extractor, wave = processor.feature_extractor, tone(2, rate)[0]
    expected = extractor.make_clip({"audio": wave, "sampling_rate": rate})
    assert expected.sample_rate == 16_000 and abs(len(expected.waveform) - 32_000) < 40
    clean = torch.from_numpy(tone(2, 16_000)[0])[1000:30_000]
    assert (expected.waveform[1000:30_000] - clean).abs().max() < 0.01
    stereo = np.stack([wave, wave])
    for audio in (torch.from_numpy(wave), wave.tolist(), stereo, stereo.T, (wave * 32768).astype(np.int16)):
        clip = extractor.make_clip({"audio": audio, "sampling_rate": rate})
        torch.testing.assert_close(clip.waveform, expected.waveform, atol=1e-4, rtol=0)
        assert clip.audio_present.all() and not clip.video_present.any()
    for value in ({"array": wave, "sampling_rate": rate, "path": None}, {"audio": (wave, rate)}):
        assert torch.equal(extractor.make_clip(value).waveform, expected.waveform)


def test_streams_of_unequal_length_are_masked_where_they_end(processor):
    clip = processor.feature_extractor.make_clip(
        {"video": np.stack(ramp(10)), "fps": 10, "audio": tone(2, 16_000)[0], "sampling_rate": 16_000}
    )
    assert clip.video_present.tolist() == [True, True, False, False] and clip.audio_present.all()
    batch = processor(clip)
    assert batch["video_mask"].tolist() == [[True, True, False, False]]


def test_given_sound_replaces_that_of_the_file(processor, files):
    extractor = processor.feature_extractor
    plain, low = extractor.read(files["both"]), tone(2, 16_000, hertz=110)[0]
    clip = extractor.make_clip({"video": files["both"], "audio": low, "sampling_rate": 16_000})
    assert torch.equal(clip.frames, plain.frames) and torch.equal(clip.waveform, torch.from_numpy(low))
    assert any("replaced" in note for note in clip.notes)
    joined = extractor.make_clip({"video": files["both"], "audio": str(files["sound"])})
    assert torch.equal(joined.waveform[:32_000], extractor.read(files["sound"]).waveform[:32_000])


@dataclass
class Decoder:
    """A decoder of torchcodec, as far as `datasets` hands one out; what it was made of is optional."""

    _hf_encoded: dict | None = None

    def get_frames_played_at(self, seconds): ...


def test_values_of_datasets_are_read_from_what_they_were_made_of(processor, files):
    extractor = processor.feature_extractor
    expected = extractor.read(files["both"])
    content = files["both"].read_bytes()
    encoded = [{"path": str(files["both"]), "bytes": None}, {"path": None, "bytes": content}, {"bytes": content}]
    values = [*encoded, content, f"file://{files['both']}", *map(Decoder, encoded[:2])]
    values += [{"video": value} for value in values]
    for value in values:
        clip = extractor.make_clip(value)
        assert torch.equal(clip.frames, expected.frames) and torch.equal(clip.waveform, expected.waveform)


def test_columns_of_a_data_set(processor, files):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"video": [str(files["both"])], "audio": [str(files["sound"])]})
    table = table.cast_column("video", datasets.Video(decode=False))
    row = table.cast_column("audio", datasets.Audio(decode=False))[0]
    expected = processor.feature_extractor.make_clip({"video": files["both"], "audio": files["sound"]})
    clip = processor.feature_extractor.make_clip(dict(row))
    assert torch.equal(clip.frames, expected.frames) and torch.equal(clip.waveform, expected.waveform)


def test_transformers_names_of_the_arguments(processor, files):
    frames, wave = np.stack(ramp(10)), tone(1, 16_000)[0]
    expected = processor([{"video": frames, "fps": 10, "audio": wave, "sampling_rate": 16_000}] * 2, TEXTS[:2])
    for videos in ([frames, frames], np.stack([frames, frames]), [list(frames), list(frames)]):
        batch = processor(text=TEXTS[:2], videos=videos, audio=[wave, wave], fps=10, sampling_rate=16_000)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    one = processor(text=TEXTS[0], videos=frames, audio=wave, fps=10, sampling_rate=16_000, padding=True)
    assert torch.equal(one["video"], expected["video"][:1])
    metadata = {"fps": 20, "frames_indices": list(range(0, 20, 2)), "total_num_frames": 20}
    assert torch.equal(
        processor(videos=frames, video_metadata=metadata)["video"], processor(videos=frames, fps=10)["video"]
    )
    paths = processor(videos=[str(files["both"])] * 2, text=TEXTS[:2])
    assert torch.equal(paths["video"], processor([files["both"]] * 2)["video"])
    still = PIL.Image.fromarray(frames[7])
    assert number_of(processor.feature_extractor.pixels(processor(images=still)["video"])[0, 0, 0]) == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"video": np.zeros((3, 8, 8, 3), np.uint8)}, "fps=None and times=None"),
        ({"video": np.zeros((3, 8, 8, 3), np.uint8), "fps": 0}, "fps=0"),
        ({"video": np.zeros((3, 8, 8, 3), np.uint8), "times": [0, 2, 1]}, "ascending"),
        ({"video": np.zeros((0, 8, 8, 3), np.uint8), "fps": 5}, "no frames"),
        ({"video": np.zeros((3, 8, 8, 4), np.uint8), "fps": 5}, r"shape \(8, 8, 4\)"),
        ({"video": np.full((3, 8, 8, 3), 9.0), "fps": 5}, "floats from 9 to 9"),
        ({"video": np.zeros((3, 8, 8, 3), np.int64), "fps": 5}, "int64"),
        ({"audio": np.zeros(99, np.float32)}, "sampling_rate"),
        ({"audio": np.array([0.0, np.nan]), "sampling_rate": 9}, "not finite"),
        ({"audio": np.zeros((2, 2, 2)), "sampling_rate": 9}, r"shape \(2, 2, 2\)"),
        ({"vdeo": 1, "video": "x"}, "unknown key 'vdeo'"),
        ({"video": "https://example.org/clip.mp4"}, "download it first"),
        ({"video": 5}, "video of type int"),
        (5, "a clip of type int"),
        ({}, "a clip of type dict"),
        (None, "a clip of type NoneType"),
    ],
)
def test_impossible_values_are_refused_by_name(processor, value, message):
    with pytest.raises(UserError, match=message) as caught:
        processor([value])
    assert "\n" not in str(caught.value)


def test_arguments_of_other_processors_are_refused_by_name(processor):
    with pytest.raises(UserError, match="unknown argument"):
        processor(text=TEXTS[0], max_length=5)
    with pytest.raises(UserError, match="two names of the same"):
        processor(prompts=TEXTS[0], text=TEXTS[0])
    with pytest.raises(UserError, match="2 of audio for 1 clips|1 of videos for 2 clips"):
        processor(videos=[np.zeros((3, 8, 8, 3), np.uint8)], audio=[np.zeros(99)] * 2, fps=2, sampling_rate=99)


def ask(files, answer: str | None = None, **part) -> list[dict]:
    content = [{"type": "video", "path": str(files["both"])} | part, {"type": "text", "text": TEXTS[0]}]
    messages = [{"role": "user", "content": content}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def test_a_conversation_is_a_clip_a_prompt_and_a_target(processor, files):
    settings = {"tokenize": True, "return_dict": True}
    for conversations, targets in (
        (ask(files), None),
        ([ask(files), ask(files)], None),
        ([ask(files, "two")] * 2, ["two"] * 2),
    ):
        batch = processor.apply_chat_template(conversations, add_generation_prompt=True, **settings)
        count = 1 if isinstance(conversations[0], dict) else len(conversations)
        expected = processor([files["both"]] * count, [TEXTS[0]] * count, targets)
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert processor.apply_chat_template(ask(files)) == f"<bos>{TEXTS[0]}<sep>"
    assert processor.apply_chat_template([ask(files, "two")]) == [f"<bos>{TEXTS[0]}<sep>two<eos>"]
    ids = processor.apply_chat_template(ask(files), tokenize=True)
    assert torch.equal(ids, processor.encode_text(TEXTS[0])["decoder_input_ids"])


def test_earlier_turns_are_the_first_lines_of_the_prompt(processor, files):
    later = [{"role": "assistant", "content": "two"}, {"role": "user", "content": TEXTS[1]}]
    batch = processor.apply_chat_template([*ask(files), *later], tokenize=True, return_dict=True)
    expected = processor(files["both"], f"{TEXTS[0]}\ntwo\n{TEXTS[1]}")
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    whole = [*ask(files), *later, {"role": "assistant", "content": "blue"}]
    assert processor.apply_chat_template(whole) == f"<bos>{TEXTS[0]}\ntwo\n{TEXTS[1]}<sep>blue<eos>"


def test_parts_of_a_conversation_may_be_in_memory(processor, files):
    parts = [
        {"type": "video", "video": np.stack(ramp(10)), "fps": 10},
        {"type": "audio", "audio": tone(1, 16_000)[0], "sampling_rate": 16_000},
    ]
    content = [*parts, {"type": "text", "text": TEXTS[1]}]
    batch = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    expected = processor([{name: value for part in parts for name, value in part.items() if name != "type"}], TEXTS[1])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    silent = processor.apply_chat_template(ask(files), tokenize=True, return_dict=True, load_audio_from_video=False)
    assert not silent["audio_mask"].any() and silent["video_mask"].all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: [{"role": "assistant", "content": "a"}, *m], {}, "begins with an answer"),
        (lambda m: [*m, *[{"role": "assistant", "content": "a"}] * 2], {}, "two answers in a row"),
        (lambda m: [*m, {"role": "assistant", "content": "a"}, *m], {}, "several parts of video"),
        (lambda m: [{"role": "tool", "content": "x"}], {}, "role='tool'"),
        (lambda m: [{"role": "user", "content": [{"type": "pdf"}]}], {}, "'pdf'"),
        (lambda m: [{"role": "user", "content": m[0]["content"][:1]}], {}, "without text"),
        (lambda m: [{"role": "user", "content": [m[0]["content"][0]] * 2 + ["x"]}], {}, "several parts of video"),
        (lambda m: [{"role": "user", "content": [{"type": "video"}, "x"]}], {}, "found 0"),
        (lambda m: m, {"continue_final_message": True}, "continue_final_message"),
        (lambda m: m, {"chat_template": "{{ x }}"}, "chat_template"),
        (lambda m: m, {"tools": [1]}, "tools"),
        (lambda m: m, {"padding": "max_length"}, "padding='max_length'"),
        (lambda m: [m, [*m, {"role": "assistant", "content": "a"}]], {}, "batches of one kind"),
        (lambda m: [m, [{"role": "user", "content": "x"}]], {}, "batches of one kind"),
        (lambda m: [], {}, "list of messages"),
    ],
)
def test_conversations_that_mirasol_has_no_place_for_are_refused(processor, files, change, options, message):
    with pytest.raises(UserError, match=message):
        processor.apply_chat_template(change(ask(files)), tokenize=True, return_dict=True, **options)


def test_a_frame_of_a_decoder_without_its_file(processor):
    """torchcodec's own interface, as its documentation has it."""

    @dataclass
    class Batch:
        data: torch.Tensor
        pts_seconds: torch.Tensor

    @dataclass
    class Samples:
        data: torch.Tensor
        sample_rate: int
        pts_seconds: float

    frames = torch.from_numpy(np.stack(ramp(10))).permute(0, 3, 1, 2)

    class VideoDecoder:
        metadata = replace(Metadata(1.0))

        def __len__(self):
            return 10

        def get_frames_played_at(self, seconds): ...

        def get_frames_in_range(self, start, stop):
            return Batch(frames[start:stop], torch.arange(start, stop) / 10)

    class AudioDecoder:
        def get_all_samples(self):
            return Samples(torch.from_numpy(tone(1, 16_000)), 16_000, 0.0)

    extractor = processor.feature_extractor
    clip = extractor.make_clip({"video": VideoDecoder(), "audio": AudioDecoder()})
    expected = extractor.make_clip({"video": frames, "fps": 10, "audio": (tone(1, 16_000)[0], 16_000)})
    assert torch.equal(clip.frames, expected.frames) and torch.equal(clip.waveform, expected.waveform)


@dataclass
class Metadata:
    end_stream_seconds: float
