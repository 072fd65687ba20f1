"""The model under transformers' own Trainer, since people will use it."""

import copy

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration, UserError

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

STACK = {"depth": 1, "width": 32, "hidden": 32, "heads": 1, "head_width": 32}
PARTS = {part: {"stack": STACK} for part in ("combiner", "reconstruction", "text")} | {
    "vit": STACK,
    "audio": {"adapter": STACK},
    "latent": {"stack": STACK, "mask_ratio": 0.0},  # no noise: the two runs have to agree
}
STEPS, CLIPS = 3, 4


class Clips(torch.utils.data.Dataset):
    """Clips of noise, each with one text of its own length."""

    def __init__(self, config: MirasolConfig):
        generator = torch.Generator().manual_seed(0)
        video, audio = config.video, config.audio
        self.rows = []
        for number in range(STEPS * CLIPS):
            ids = torch.randint(4, 100, (8,), generator=generator)
            # Targets of unequal number: a loss divided by a number of tokens would show.
            labels = torch.where(torch.arange(8) > 2 + number % 4, ids, -100)
            self.rows.append({
                "video": torch.randn(2, video.frames_per_chunk, 3, *[video.image_size] * 2, generator=generator),
                "audio": torch.randn(2, audio.spectrogram_frames, audio.num_mel_bins, generator=generator),
                **{name: torch.ones(2, dtype=torch.bool) for name in ("chunk_mask", "video_mask", "audio_mask")},
                "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids), "labels": labels,
            })  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self.rows[number]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_transformers_trainer_takes_the_steps_that_a_bare_loop_takes(tmp_path, accumulation):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    config = MirasolConfig.preset("tiny", **PARTS)
    model = MirasolForConditionalGeneration(config)
    plain, clips = copy.deepcopy(model), Clips(config)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(clips)

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=CLIPS // accumulation,
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=clips)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    optimizer, expected = torch.optim.SGD(plain.parameters(), lr=1e-2), []
    for step in range(STEPS):
        optimizer.zero_grad()
        rows, size = clips.rows[step * CLIPS : (step + 1) * CLIPS], CLIPS // accumulation
        parts = []
        for first in range(0, CLIPS, size):
            batch = {name: torch.stack([row[name] for row in rows[first : first + size]]) for name in rows[0]}
            parts.append(plain.train()(**batch).loss / accumulation)
            parts[-1].backward()
        optimizer.step()
        expected.append(sum(part.item() for part in parts))
    assert losses == pytest.approx(expected, abs=1e-4)
    for (name, trained), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, reference, rtol=1e-4, atol=1e-6, msg=name)


class ClipsWithPrompts(Clips):
    """The same with the prompts alone, as `MirasolProcessor` gives them with `return_prompts`."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row = self.rows[number]
        prompt = row["decoder_input_ids"][:3]
        return row | {"prompt_input_ids": prompt, "prompt_attention_mask": torch.ones_like(prompt)}


@pytest.mark.parametrize("generates", [False, True])
def test_a_trained_saved_and_resumed_model_loads_to_equal_logits(tmp_path, generates):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    config = MirasolConfig.preset("tiny", **PARTS)
    clips, predictions = (ClipsWithPrompts if generates else Clips)(config), []
    options = {"predict_with_generate": True, "generation_max_length": 12} if generates else {}
    trainer_class = Seq2SeqTrainer if generates else Trainer

    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        arguments = (Seq2SeqTrainingArguments if generates else TrainingArguments)(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, per_device_eval_batch_size=6,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
            save_steps=1, gradient_checkpointing=True, **options,
        )  # fmt: skip
        trainer = trainer_class(
            model=MirasolForConditionalGeneration(config), args=arguments, train_dataset=clips, eval_dataset=clips,
            compute_metrics=lambda made: predictions.append(made) or {"clips": len(made.label_ids)},
        )  # fmt: skip
        trainer.model.config.use_cache = False
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    torch.manual_seed(1)
    train(tmp_path / "a", 2)
    trainer = train(tmp_path / "a", STEPS, resume=True)
    assert trainer.evaluate()["eval_clips"] == len(clips)
    [made] = predictions
    assert len(made.predictions) == len(clips)
    assert made.predictions.ndim == (2 if generates else 3)  # token ids, or logits and nothing else
    trainer.save_model(tmp_path / "final")
    batch = {name: torch.stack([row[name] for row in clips.rows]) for name in clips.rows[0]}
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path / "final")
    uninterrupted = train(tmp_path / "b", STEPS).model.eval()
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits)
        torch.testing.assert_close(uninterrupted(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    if not generates:
        torch.testing.assert_close(torch.from_numpy(made.predictions), logits, rtol=1e-4, atol=1e-5)


def test_generating_from_rows_with_their_targets_is_refused(tmp_path):
    config = MirasolConfig.preset("tiny", **PARTS)
    model, row = MirasolForConditionalGeneration(config).eval(), ClipsWithPrompts(config)[0]
    batch = {name: value[None] for name, value in row.items()}
    answers = model.generate(**batch, max_new_tokens=3)
    del batch["labels"]
    without = {name: value for name, value in batch.items() if not name.startswith("prompt_")}
    for name in ("decoder_input_ids", "decoder_attention_mask"):
        without[name] = batch[name.replace("decoder", "prompt")]
    assert torch.equal(answers, model.generate(**without, max_new_tokens=3))
    with pytest.raises(UserError, match="return_prompts=True"):
        model.generate(**without, labels=row["labels"][None])
