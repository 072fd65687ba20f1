"""The next-latent loss and features that are the same for every clip.

Chunks of independent noise cannot be predicted: a latent loss that falls on them, on clips never trained on, falls
because the features stopped telling clips apart.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.model.losses import centre_targets, latent_loss

CLIPS, CHUNKS, TOKENS, WIDTH = 5, 4, 2, 16


@pytest.fixture
def x() -> Tensor:
    return torch.randn(CLIPS, CHUNKS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def everywhere(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def loss(predicted: Tensor, x: Tensor, target: str, distance: str = "cosine") -> Tensor:
    there = everywhere(x)
    return latent_loss(predicted, x, there, there, there, distance, target)


def test_features_equal_for_every_clip_satisfy_the_plain_target_and_win_nothing_with_the_centred(x):
    same = x[:1].expand_as(x)
    predicted = same.roll(-1, dims=1).clone().requires_grad_()
    assert loss(predicted, same, "plain") < 1e-6
    centred_loss = loss(predicted, same, "centred")
    assert centred_loss.item() == pytest.approx(1.0, abs=1e-2)
    centred_loss.backward()
    assert predicted.grad.abs().max() < 1e-3


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_what_all_clips_share_does_not_move_the_centred_loss(x, distance):
    """A code of the chunk and of the token within it is what all clips share."""
    predicted, shared = torch.randn_like(x), 3 * torch.randn(1, CHUNKS, TOKENS, WIDTH)
    torch.testing.assert_close(
        loss(predicted, x + shared, "centred", distance), loss(predicted, x, "centred", distance), rtol=1e-4, atol=1e-5
    )
    assert (loss(predicted, x + shared, "plain", distance) - loss(predicted, x, "plain", distance)).abs() > 1e-3


def test_a_prediction_of_the_whole_target_of_clips_that_share_nothing_is_right_for_both(x):
    x = x - x.mean(dim=0)
    predicted = x.roll(-1, dims=1)
    assert loss(predicted, x, "plain") < 1e-5 and loss(predicted, x, "centred") < 1e-5


def test_padding_and_clips_without_sound_do_not_count_into_the_mean_of_the_others(x):
    """Centred targets of the first three clips are the same whatever stands in padding chunks and in a clip that
    lacks a modality they have."""
    mask, audio = everywhere(x), everywhere(x)
    mask[3, 2:], audio[4] = False, False
    before, _ = centre_targets(x, mask, everywhere(x), audio)
    other = x.clone()
    other[3, 2:], other[4] = float("nan"), 100.0
    after, with_meaning = centre_targets(other, mask, everywhere(x), audio)
    assert torch.equal(before[:3], after[:3]) and after.isfinite().all()
    assert torch.equal(with_meaning, mask)
    torch.testing.assert_close(before[:4, 0].mean(dim=0), torch.zeros(TOKENS, WIDTH), atol=1e-6, rtol=0)
    torch.testing.assert_close(before[:3, 3].mean(dim=0), torch.zeros(TOKENS, WIDTH), atol=1e-6, rtol=0)


def test_a_clip_alone_is_centred_over_its_own_chunks(x):
    alone, there = x[:1], everywhere(x[:1])
    target, with_meaning = centre_targets(alone, there, there, there)
    torch.testing.assert_close(target, alone - alone.mean(dim=1, keepdim=True))
    assert with_meaning.all()
    assert loss(x[:1].roll(-1, dims=1), x[:1], "centred").isfinite()


def test_a_single_target_has_nothing_to_be_centred_over_and_does_not_count(x):
    assert loss(x[:1, :2], x[:1, :2], "centred") == 0


def test_a_target_that_lost_its_companions_keeps_those_of_its_own_clip(x):
    """The longest clip goes on when all others have ended."""
    mask = everywhere(x)
    mask[1:, 2:] = False
    target, with_meaning = centre_targets(x, mask, everywhere(x), everywhere(x))
    torch.testing.assert_close(target[0, 2:], x[0, 2:] - x[0].mean(dim=0))
    torch.testing.assert_close(target[:, :2], x[:, :2] - x[:, :2].mean(dim=0))
    assert torch.equal(with_meaning, mask)


def test_the_order_of_the_clips_does_not_matter(x):
    predicted, order = torch.randn_like(x), torch.randperm(CLIPS)
    torch.testing.assert_close(loss(predicted[order], x[order], "centred"), loss(predicted, x, "centred"))


@dataclass
class Seen:
    """What a model makes of clips: mean latent loss, mean cosine between the features x of different clips (those of a
    chunk as one vector, chunk by chunk), and how many targets it gives token by token."""

    latent_loss: float
    cosine: float
    learnt: int


class NoiseTask:
    """32 clips whose chunks are independent noise, each with a string of its own to be said; and as many unseen."""

    clips, chunks, prompt, length = 32, 4, 2, 4

    def __init__(self, target: str):
        self.config = MirasolConfig.preset("tiny", text={"vocab_size": 40}, latent={"target": target})
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(5, 40, (self.clips, self.length), generator=generator)
        assert len(words.unique(dim=0)) == self.clips
        begin, end = torch.tensor([[1, 3]]).expand(self.clips, -1), torch.full((self.clips, 1), 2)
        self.ids = torch.cat([begin, words, end], dim=1)
        self.seen, self.unseen = self._noise(generator), self._noise(generator)

    def _noise(self, generator: torch.Generator) -> dict[str, Tensor]:
        video, audio = self.config.video, self.config.audio
        frames = (video.frames_per_chunk, 3, video.image_size, video.image_size)
        spectrogram = (audio.spectrogram_frames, audio.num_mel_bins)
        there = torch.ones(self.clips, self.chunks, dtype=torch.bool)
        return {
            "video": torch.randn(self.clips, self.chunks, *frames, generator=generator),
            "audio": torch.randn(self.clips, self.chunks, *spectrogram, generator=generator),
            "chunk_mask": there,
            "video_mask": there,
            "audio_mask": there,
            "decoder_input_ids": self.ids,
            "labels": self.ids.index_fill(1, torch.arange(self.prompt), -100),
        }

    @torch.no_grad()
    def look(self, model: MirasolForConditionalGeneration, clips: dict[str, Tensor]) -> Seen:
        output = model.eval()(**clips)
        features = F.normalize(output.combined.flatten(2), dim=-1).transpose(0, 1)
        cosines = features @ features.mT
        between = cosines[:, ~torch.eye(self.clips, dtype=torch.bool)].mean()
        said = output.logits[:, self.prompt - 1 : -1].argmax(dim=-1)
        learnt = (said == self.ids[:, self.prompt :]).all(dim=1).sum()
        return Seen(output.latent_loss.item(), between.item(), int(learnt))

    def train(self, steps: int) -> tuple[float, float, int]:
        """Held-out latent loss as a share of the untrained model's, held-out cosine between clips, strings learnt."""
        from mirasol.config.recipe import OptimizerRecipe
        from mirasol.training.optim import Optimizer

        torch.manual_seed(0)
        model = MirasolForConditionalGeneration(self.config)
        before = self.look(model, self.unseen)
        optimizer = Optimizer(model, OptimizerRecipe(name="muon", learning_rate=2e-3))
        for step in range(steps):
            optimizer.set_learning_rate(2e-3 * min(1.0, (step + 1) / 50))
            optimizer.zero_grad()
            model.train()(**self.seen).loss.backward()
            optimizer.clip_gradients()
            optimizer.step()
        after = self.look(model, self.unseen)
        return after.latent_loss / before.latent_loss, after.cosine, self.look(model, self.seen).learnt


@pytest.mark.slow
def test_the_default_latent_loss_cannot_be_met_by_features_that_tell_no_clips_apart():
    default = MirasolConfig.preset("tiny").latent.target
    share, cosine, learnt = NoiseTask(default).train(200)
    assert (share >= 0.8, cosine <= 0.5, learnt) == (True, True, 32), (share, cosine, learnt)


@pytest.mark.slow
def test_the_plain_latent_loss_can():
    """So the test above is able to fail: the text is learnt, and still the loss of the unpredictable falls far below
    the bound. How alike clips become differs more from draw to draw (cosines of 0.60 and 0.89 were seen)."""
    share, cosine, learnt = NoiseTask("plain").train(200)
    assert share < 0.6 and learnt == 32, (share, cosine, learnt)
