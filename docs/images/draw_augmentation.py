"""Draws the pictures of docs/augmentation.md from a rendered clip or two (needs Pillow, which TensorBoard brings).

mirasol data synthesize runs/pictures --train 2 --validation 1 --test 1
python docs/images/draw_augmentation.py runs/pictures docs/images
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mirasol import MirasolFeatureExtractor
from mirasol.config.augment import Augment, SpecAugment
from mirasol.evaluation.figures import map_to_colours
from mirasol.media.augment import augment_clip, compute_decode_size, shift_clip
from mirasol.model.losses import text_loss
from mirasol.model.transformer import LayerDrop

SIDE, WIDTH, LABEL, HEIGHT = 72, 12 * 72, 150, 64  # pixels: of a frame, a strip, the words before it, a spectrogram
PAPER, INK, PALE, ABSENT = (255, 255, 255), (40, 40, 40), (150, 150, 150), 225

Row = tuple[str, np.ndarray]


def strip(video: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """Every other frame of a clip [T, F, 3, side, side] beside each other; pale where the mask [T] has none."""
    if mask is not None:
        video = video.masked_fill(~mask[:, None, None, None, None], ABSENT)
    frames = video.flatten(0, 1)[::2].permute(0, 2, 3, 1).numpy()
    tiles = [np.asarray(Image.fromarray(frame).resize((SIDE, SIDE))) for frame in frames]
    return np.concatenate(tiles, axis=1)


def sound(audio: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """A log-mel [T, S, M], low notes at the bottom; on one scale, so that rows can be compared."""
    values = audio.flatten(0, 1).float().T.flip(0).clamp(-1, 0.5).numpy()
    scale = np.concatenate([values, np.full((1, values.shape[1]), -1.0), np.full((1, values.shape[1]), 0.5)])
    picture = map_to_colours(scale)[:-2]
    if mask is not None:
        picture[:, ~mask.repeat_interleave(audio.shape[1]).numpy()] = ABSENT
    return np.asarray(Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))


def save(path: Path, rows: list[Row]) -> None:
    """Rows of words and a picture, one below the other; an empty word keeps a row close to the one above."""
    font = ImageFont.load_default(size=14)
    gaps = [10 if words else 2 for words, _ in rows]
    height = sum(gaps) + sum(len(picture) for _, picture in rows) + 10
    sheet = Image.new("RGB", (LABEL + max(picture.shape[1] for _, picture in rows) + 10, height), PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for gap, (words, picture) in zip(gaps, rows, strict=True):
        top += gap
        draw.multiline_text((10, top + 4), words, INK, font=font)
        sheet.paste(Image.fromarray(picture), (LABEL, top))
        top += len(picture)
    sheet.save(path, optimize=True)


def draw_clips(data: Path, out: Path) -> None:
    """One picture for each augmentation of a clip."""
    first, second, *_ = sorted((data / "clips" / "train").glob("*.mp4"))
    extractor = MirasolFeatureExtractor(image_size=SIDE)
    large = MirasolFeatureExtractor(image_size=compute_decode_size(SIDE, 0.4))
    clip, other = (extractor.tensors(extractor.read(path)) for path in (first, second))
    chunks = min(len(clip["video"]), len(other["video"]), 6)
    clip, other = ({name: value[:chunks] for name, value in each.items()} for each in (clip, other))
    whole: list[Row] = [("the clip", strip(clip["video"])), ("", sound(clip["audio"]))]

    masks = Augment(SpecAugment(1, 24, 2, 16))
    hidden = [sound(augment_clip(clip, masks, SIDE, seed)["audio"]) for seed in (1, 2)]
    save(out / "augmentation-spec-augment.png",
         [("the clip", whole[1][1]), ("one epoch", hidden[0]), ("another", hidden[1])])  # fmt: skip

    decoded = large.tensors(large.read(first))
    crops = [strip(augment_clip(decoded, Augment(crop=0.4), SIDE, seed)["video"][:chunks]) for seed in (4, 7)]
    save(out / "augmentation-crop.png", [whole[0], ("crop: 0.4,\none epoch", crops[0]), ("another", crops[1])])

    save(out / "augmentation-flip.png", [whole[0], ("mirrored", strip(clip["video"].flip(-1)))])

    rows = list(whole)
    for frames, words in ((3, "3 frames later"), (-5, "5 frames earlier")):
        moved = shift_clip(clip, frames)
        rows += [(words, strip(moved["video"], moved["video_mask"])), ("", sound(moved["audio"], moved["audio_mask"]))]
    save(out / "augmentation-time-shift.png", rows)

    share = 0.7
    mixed = [torch.lerp(other[name].float(), clip[name].float(), share) for name in ("video", "audio")]
    rows = [*whole, ("its partner", strip(other["video"])), ("", sound(other["audio"]))]
    rows += [("70% of one, 30%\nof the other", strip(mixed[0].round().to(torch.uint8))), ("", sound(mixed[1]))]
    save(out / "augmentation-mixup.png", rows)


def enlarged(values: Tensor, cell: int) -> np.ndarray:
    """Numbers [height, width] as squares of grey: 0 white, the largest dark."""
    grey = 255 - 200 * values / values.max()
    pixels = grey.to(torch.uint8).repeat_interleave(cell, 0).repeat_interleave(cell, 1).numpy()
    lined = pixels.copy()
    lined[::cell], lined[:, ::cell] = 225, 225
    return np.repeat(lined[..., None], 3, axis=2)


def draw_rates(out: Path) -> None:
    """Pictures of what dropout and layer drop leave, and of the smoothed loss."""
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(16, 60), 0.1)
    save(out / "regulariser-dropout.png", [("dropout: 0.1\n60 features of\n16 tokens", enlarged(kept, 12))])
    branches = torch.stack(LayerDrop(0.3).train()(torch.zeros(60, 1, 1), 8, 2)).flatten(0, 1)[..., 0, 0].flip(0)
    words = "layer_drop: 0.3\n2 branches of\n8 blocks, the last\non top, for 60\nsequences"
    save(out / "regulariser-layer-drop.png", [(words, enlarged(branches, 12))])
    draw_smoothing(out / "regulariser-label-smoothing.png")


def draw_smoothing(path: Path, vocabulary: int = 512) -> None:
    """The loss of one token over the probability of the right one, the rest of it shared by all others."""
    font, width, height = ImageFont.load_default(size=14), 560, 240
    sheet = Image.new("RGB", (width + 90, height + 60), PAPER)
    draw = ImageDraw.Draw(sheet)
    probability = 1 - torch.logspace(-0.0005, -6, 200)
    for place, smoothing in enumerate((0.0, 0.2, 0.3)):
        rest = (1 - probability) / (vocabulary - 1)
        logits = rest[:, None].repeat(1, vocabulary).index_copy(1, torch.tensor([0]), probability[:, None]).log()
        losses = [
            float(text_loss(row[None], torch.zeros(1, dtype=torch.long), lambda x: x, vocabulary, smoothing=smoothing))
            for row in logits
        ]
        # Nines to the right: 0, 0.9, 0.99, ...
        x = 50 - (1 - probability).log10() / 6 * width
        y = 10 + height - torch.tensor(losses) / 7 * height
        colour = ((40, 40, 40), (200, 80, 30), (30, 110, 200))[place]
        draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), colour, 2)
        draw.text((280, 20 + 22 * place), f"label_smoothing: {smoothing}", colour, font=font)
    draw.rectangle((50, 10, 50 + width, 10 + height), outline=PALE)
    for nines, words in enumerate(("0", "0.9", "0.99", "0.999", "0.9999")):
        draw.text((50 + nines / 6 * width, 16 + height), words, INK, font=font, anchor="ma")
    for loss in range(0, 8):
        draw.text((44, 10 + height - loss / 7 * height), str(loss), INK, font=font, anchor="rm")
    draw.text(
        (50 + width / 2, 36 + height), "probability of the right token; up: its loss", INK, font=font, anchor="ma"
    )
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw_clips(arguments.data, arguments.out)
    draw_rates(arguments.out)
