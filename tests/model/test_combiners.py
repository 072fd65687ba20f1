"""Properties of every Combiner: what it may see, what a batch may change, and that all of it learns."""

import pytest
import torch

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.model.combiner import make_combiner
from mirasol.model.token_turing import TokenLearner

TTM = {"read_tokens": 12, "memory_tokens": 6, "learner_hidden": 16, "hidden": 32, "heads": 2, "head_width": 16}
TOKENS = 21
COMBINERS = {
    "transformer": {},
    "transformer of a chunk": {"scope": "chunk"},
    "cls": {"kind": "cls", "m": 7},
    "cls of a chunk": {"kind": "cls", "scope": "chunk"},
    "perceiver": {"kind": "perceiver", "m": 7},
    "perceiver of a chunk": {"kind": "perceiver", "scope": "chunk"},
    "ttm": {"kind": "ttm", "m": 7, "ttm": TTM},
    "late": {"kind": "late", "m": 6},
    "late of a chunk": {"kind": "late", "scope": "chunk"},
    "concat": {"kind": "concat", "m": TOKENS},
}
SEES_THE_PAST = [name for name in COMBINERS if name in ("transformer", "cls", "perceiver", "ttm", "late")]
MEDIA = ("video", "audio", "chunk_mask", "video_mask", "audio_mask")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}

every_combiner = pytest.mark.parametrize("name", COMBINERS)


def configured(name: str) -> MirasolConfig:
    return MirasolConfig.preset("tiny", combiner=COMBINERS[name], text={"vocab_size": 40})


def whole_model(name: str) -> MirasolForConditionalGeneration:
    torch.manual_seed(0)
    return MirasolForConditionalGeneration(configured(name)).eval()


def combiner_and_features(name: str, chunks: int = 5):
    generator = torch.Generator().manual_seed(3)
    video, audio = (torch.randn(2, chunks, count, 96, generator=generator) for count in (13, 8))
    return whole_model(name).combiner, video, audio


@every_combiner
def test_one_pass_equals_step_by_step(name):
    """For every t: run on f_1..f_t alone, the last chunk's x is that of the one pass over all chunks."""
    combiner, video, audio = combiner_and_features(name)
    with torch.no_grad():
        whole = combiner(video, audio)
        assert whole.shape == (2, 5, configured(name).combiner.m, 96)
        for t in range(1, 6):
            part = combiner(video[:, :t], audio[:, :t])
            torch.testing.assert_close(part[:, -1], whole[:, t - 1], **TOLERANCE)


@every_combiner
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_later_chunk_changes_nothing_before_it_and_an_earlier_one_all_after_it(name, modality):
    combiner, video, audio = combiner_and_features(name)
    other = {"video": video.clone(), "audio": audio.clone()}
    other[modality][:, 2] += torch.randn_like(other[modality][:, 2])
    with torch.no_grad():
        change = (combiner(video, audio) - combiner(**other)).abs().amax(dim=(0, 2, 3))
    assert (change[:2] == 0).all()
    assert change[2] > 1e-3
    if name in SEES_THE_PAST:
        assert (change[3:] > 1e-5).all()
    else:
        assert (change[3:] == 0).all()


@pytest.mark.parametrize("kind", ["transformer", "cls", "perceiver"])
def test_the_scopes_differ_in_what_is_seen_and_in_nothing_else(kind):
    """With the same weights they agree on the first chunk, which has no past, and on no later one."""
    past, video, audio = combiner_and_features(kind)
    alone = make_combiner(MirasolConfig.preset("tiny", combiner=COMBINERS[kind] | {"scope": "chunk"})).eval()
    alone.load_state_dict(past.state_dict())
    with torch.no_grad():
        with_past, without = past(video, audio), alone(video, audio)
    torch.testing.assert_close(with_past[:, 0], without[:, 0], **TOLERANCE)
    assert ((with_past - without)[:, 1:].abs().amax(dim=(0, 2, 3)) > 1e-3).all()


@every_combiner
def test_batch_equals_single(name, batch):
    model = whole_model(name)
    with torch.no_grad():
        together = model.encode(**{key: batch[key] for key in MEDIA})
        for clip, chunks in enumerate((4, 2, 3)):
            alone = model.encode(**{key: batch[key][clip : clip + 1, :chunks] for key in MEDIA})
            torch.testing.assert_close(together.latents[clip, :chunks], alone.latents[0], **TOLERANCE)


@every_combiner
def test_a_step_trains_every_weight(name, batch):
    model = whole_model(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    output = model(**batch)
    output.loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in model.named_parameters())


@every_combiner
def test_answers_saves_and_loads(name, batch, tmp_path):
    model = whole_model(name)
    inputs = {key: batch[key] for key in MEDIA} | {"decoder_input_ids": batch["decoder_input_ids"][:, :4]}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    model.save_pretrained(tmp_path)
    loaded = MirasolForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.combiner == model.config.combiner
    answer = model.generate(**inputs, **settings)
    assert torch.equal(answer, loaded.generate(**inputs, **settings))
    assert torch.equal(answer, model.generate(**inputs, **settings, use_cache=False))


@every_combiner
def test_bfloat16_runs(name, batch):
    model = whole_model(name).to(torch.bfloat16)
    media = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        output = model(**media)
    assert output.combined.dtype == torch.bfloat16
    assert output.loss.isfinite()


# The Token Turing Machine


def test_memory_keeps_its_size_and_holds_the_past():
    combiner, video, audio = combiner_and_features("ttm", chunks=20)
    features = torch.cat([video, audio], dim=2)
    memory, seen = combiner.empty_memory(2), []
    assert (memory == 0).all()
    with torch.no_grad():
        for t in range(20):
            x, memory = combiner.process_chunk(features[:, t], memory)
            seen.append(x)
            assert memory.shape == (2, TTM["memory_tokens"], 96)
            assert memory.abs().max() <= 2 * features.abs().max()
        torch.testing.assert_close(torch.stack(seen, dim=1), combiner(video, audio), **TOLERANCE)


def test_a_token_learner_gives_weighted_means():
    """Whatever the scores: equal tokens come out as themselves, and nothing leaves the tokens' range."""
    learner = TokenLearner(5, 3, 8, 4)
    torch.nn.init.normal_(learner.position)
    equal = torch.randn(2, 1, 8).expand(2, 5, 8)
    torch.testing.assert_close(learner(equal), equal[:, :3])
    x = torch.randn(2, 5, 8)
    assert (learner(x) <= x.amax(1, keepdim=True) + 1e-6).all() and (learner(x) >= x.amin(1, keepdim=True) - 1e-6).all()


def test_the_papers_machine_has_its_sizes():
    config = MirasolConfig.preset("3b", combiner={"kind": "ttm"})
    with torch.device("meta"):
        combiner = make_combiner(config)
    assert combiner.empty_memory(1).shape == (1, 256, 1024)
    assert combiner.read.scores.out_features == 512
    assert combiner.process.blocks[0].attention.query.weight.shape == (768, 1024)
    assert combiner.output.out_features == 32
