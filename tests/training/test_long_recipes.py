"""The paper's trainings on 512 frames, from the annotations as they are published to the measured answers: with the
tiny model, on videos whose frames tell their number."""

import json
from pathlib import Path

import numpy as np
import pytest
from media_making import Audio, Video, number_of, ramp, steady, tone, write_media

from mirasol.cli.main import main
from mirasol.media.feature_extractor import MirasolFeatureExtractor

RECIPES = Path(__file__).parents[2] / "recipes" / "paper"
SIZES = [(600, 15.0), (3_000, 59.94), (512, 7.5), (700, 12.5)]  # frames, and how many a second
MODEL = {
    "chunking": {"chunk_seconds": None, "num_chunks": 64},
    "video": {"frames_per_chunk": 8},
}
# What the size of the model, of the videos and of the machine asks for; all else is the recipe's.
SMALL = {
    "model.init": "null", "model.preset": "tiny", "model.image_size": "null", "model.num_chunks": "null",
    "model.overrides": json.dumps(MODEL), "tokenizer.init": "tiny", "stages.questions.epochs": "null",
    "stages.questions.steps": "2", "stages.questions.clips_per_step": "2", "accumulation": "2", "parallel": "null",
    "precision": "fp32", "optimizer.warmup_steps": "1", "log_every": "1", "validate_every": "1",
    "validation_clips": "2", "workers": "0", "device": "cpu", "threads": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Videos of 10 to 68 s, one without sound, under names that both data sets use."""
    folder = tmp_path_factory.mktemp("long")
    for number, (frames, rate) in enumerate(SIZES):
        tracks = [Video(ramp(frames), steady(frames, rate), rate=round(rate))]
        if number != 2:
            tracks.append(Audio([(0.0, tone(frames / rate, 16_000))], rate=16_000))
        write_media(folder / f"{number}.mp4", *tracks)
    return folder


def write_activitynet_qa(folder: Path) -> None:
    for split in ("train", "val", "test"):
        ids = [{"question_id": f"v_{n}_1"} for n in range(len(SIZES))]
        asked = [{"video_name": str(n), "question": "is the person in the house outdoor"} for n in range(len(SIZES))]
        answers = [{"answer": "yes" if n % 2 else "no", "type": 3} for n in range(len(SIZES))]
        for name, rows in (("q", asked), ("a", answers)):
            rows = [row | number for row, number in zip(rows, ids, strict=True)]
            (folder / f"{split}_{name}.json").write_text(json.dumps(rows))


def write_nextqa(folder: Path) -> None:
    head = "video,frame_count,width,height,question,answer,qid,type\n"
    rows = [f"{n},{frames},64,48,what does it do,roll {n},{n},CH\n" for n, (frames, _) in enumerate(SIZES)]
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text(head + "".join(rows))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "write"), [("activitynet_qa", write_activitynet_qa), ("nextqa_oe", write_nextqa)])
def test_a_training_on_512_frames_runs_from_annotations_to_answers(name, write, videos, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in videos.iterdir():
        (data / path.name).symlink_to(path)
    write(data)
    options = [f"--{key}={value}" for key, value in SMALL.items()]
    recipe, run = RECIPES / f"finetune_{name.removesuffix('_oe')}_512.yaml", tmp_path / "run"
    where = ["--data.root", str(data), "--output", str(run), "--data.cache", str(tmp_path / "cache")]
    main(["train", "--config", str(recipe), *where, *options])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= 2 and np.isfinite(losses).all()

    extractor = MirasolFeatureExtractor.from_pretrained(run / "checkpoint")
    assert (extractor.max_chunks, extractor.media.frames_per_chunk) == (64, 8)
    for number, (frames, _) in enumerate(SIZES):
        clip = extractor.read(videos / f"{number}.mp4")
        seen = [number_of(frame) for frame in clip.frames]
        assert len(set(seen)) == 512 and seen == sorted(seen) and seen[-1] > frames - 1 - frames / 256

    asked = ["evaluate", str(run), name, str(data), "--split", "test", "--output", str(tmp_path / "results")]
    main([*asked, "--skip-controls"])
    predictions = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == len(SIZES)
