"""Candidates are scored as if each stood alone, on latents that are computed once."""

import pytest
import torch
from test_mirasol import MEDIA, TOLERANCE

from mirasol import MirasolConfig, MirasolForConditionalGeneration
from mirasol.errors import UserError
from mirasol.model import scoring

EOS = 2
# Two prompts for each of three clips, of unequal lengths; candidates of unequal numbers and lengths.
PROMPTS = [[1, 7, 8, 3], [1, 9, 3], [1, 5, 6, 7, 8, 3], [1, 3], [1, 11, 3], [1, 12, 13, 3]]
CANDIDATES = [
    [[20], [21, 22], [20, 23, 24, 25]],
    [[26]],
    [[27, 28], [29]],
    [[30], [31], [32], [30, 31]],
    [[33, 34, 35], [33, 34]],
    [[36, 20], [37]],
]


def padded(rows, length, left=False):
    pads = [[0] * (length - len(row)) for row in rows]
    return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])


def inputs(prompts=PROMPTS, candidates=CANDIDATES, left=True, extra=0) -> dict[str, torch.Tensor]:
    """As a processor gives them; `extra` pads everything further."""
    length = max(map(len, prompts)) + extra
    count, width = max(map(len, candidates)) + extra, max(len(c) for row in candidates for c in row) + 1 + extra
    rows = [[[*c, EOS] for c in row] + [[]] * (count - len(row)) for row in candidates]
    return {
        "decoder_input_ids": padded(prompts, length, left),
        "decoder_attention_mask": padded([[1] * len(p) for p in prompts], length, left),
        "candidate_ids": torch.stack([padded(row, width) for row in rows]),
        "candidate_mask": torch.stack([padded([[1] * len(c) for c in row], width) for row in rows]).bool(),
    }


def encoded(model, batch):
    with torch.no_grad():
        return model.encode(**{name: batch[name] for name in MEDIA})


def one_by_one(model, latents, prompt, candidate) -> float:
    """The sum of the log-softmax of `forward` at the candidate's tokens and its <eos>."""
    text = torch.tensor([prompt + candidate + [EOS]])
    with torch.no_grad():
        logits = model(encoder_outputs=latents, decoder_input_ids=text).logits
    found = logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])
    return found[len(prompt) - 1 :].sum().item()


def clip_of(latents, clip):
    return type(latents)(**{name: value[clip : clip + 1] for name, value in latents.items()})


def expected(model, latents) -> torch.Tensor:
    total = torch.full((6, 4), float("-inf"))
    for row, candidates in enumerate(CANDIDATES):
        for place, candidate in enumerate(candidates):
            total[row, place] = one_by_one(model, clip_of(latents, row // 2), PROMPTS[row], candidate)
    return total


def test_scores_are_the_sums_of_log_probabilities_one_by_one(model, batch):
    latents = encoded(model, batch)
    scores = model.score(latents, **inputs())
    torch.testing.assert_close(scores.total, expected(model, latents), **TOLERANCE)
    tokens = torch.tensor([[len(c) + 1 for c in row] + [0] * (4 - len(row)) for row in CANDIDATES])
    assert torch.equal(scores.tokens, tokens)
    there = tokens > 0
    torch.testing.assert_close(scores.per_token[there], scores.total[there] / tokens[there])
    assert (scores.per_token[~there] == float("-inf")).all()


@pytest.mark.parametrize("how", [{"left": False}, {"extra": 3}, {"left": False, "extra": 2}])
def test_padding_changes_nothing(model, batch, how):
    latents = encoded(model, batch)
    plain, other = model.score(latents, **inputs()), model.score(latents, **inputs(**how))
    torch.testing.assert_close(plain.total, other.total[:, :4], **TOLERANCE)
    assert (other.tokens[:, 4:] == 0).all()


def test_what_stands_on_padding_does_not_matter(model, batch):
    latents, text = encoded(model, batch), inputs()
    other = dict(text)
    other["candidate_ids"] = torch.where(text["candidate_mask"], text["candidate_ids"], 39)
    assert torch.equal(model.score(latents, **text).total, model.score(latents, **other).total)


def test_the_order_of_candidates_and_the_batch_change_nothing(model, batch):
    latents, together = encoded(model, batch), model.score(encoded(model, batch), **inputs())
    order = torch.tensor([3, 1, 0, 2])
    shuffled = {name: value[:, order] if "candidate" in name else value for name, value in inputs().items()}
    torch.testing.assert_close(model.score(latents, **shuffled).total, together.total[:, order], **TOLERANCE)
    for clip in range(3):
        rows = slice(2 * clip, 2 * clip + 2)
        alone = model.score(clip_of(latents, clip), **inputs(PROMPTS[rows], CANDIDATES[rows]))
        count = alone.total.shape[1]
        torch.testing.assert_close(alone.total, together.total[rows, :count], **TOLERANCE)


def test_many_candidates_go_in_parts_to_the_same_scores(model, batch, monkeypatch):
    latents = encoded(model, batch)
    whole = model.score(latents, **inputs())
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 100)
    torch.testing.assert_close(model.score(latents, **inputs()).total, whole.total, **TOLERANCE)


@pytest.mark.parametrize(
    "text",
    [
        {"learned_positions": True, "max_length": 11},
        {"tied": False},
        {"stack": {"width": 48}},
        {"cross_attention_every": 2},
    ],
)
def test_scores_under_the_switches_of_the_text_decoder(batch, text):
    torch.manual_seed(0)
    config = MirasolConfig.preset("tiny", text={"vocab_size": 40} | text)
    model = MirasolForConditionalGeneration(config).eval()
    latents = encoded(model, batch)
    torch.testing.assert_close(model.score(latents, **inputs()).total, expected(model, latents), **TOLERANCE)


def test_scores_agree_with_the_training_loss(model, batch):
    """The target tokens are those of training: <eos> is one of them, <sep> is not."""
    latents = encoded(model, batch)
    scores = model.score(latents, **inputs(candidates=[row[:1] for row in CANDIDATES]))
    rows = [p + row[0] + [EOS] for p, row in zip(PROMPTS, CANDIDATES, strict=True)]
    labels = [[-100] * len(p) + row[0] + [EOS] for p, row in zip(PROMPTS, CANDIDATES, strict=True)]
    length = max(map(len, rows))
    with torch.no_grad():
        loss = model(
            **{name: batch[name] for name in MEDIA},
            decoder_input_ids=padded(rows, length),
            decoder_attention_mask=padded([[1] * len(row) for row in rows], length),
            labels=torch.tensor([label + [-100] * (length - len(label)) for label in labels]),
        ).text_loss
    torch.testing.assert_close(-scores.total.sum() / scores.tokens.sum(), loss, **TOLERANCE)


def test_only_target_positions_reach_the_vocabulary(model, batch):
    rows = []
    plain = model.text.logits
    model.text.logits = lambda hidden: rows.append(len(hidden)) or plain(hidden)
    model.score(encoded(model, batch), **inputs())
    # The first tokens of a row's candidates share one place; the others have one each.
    assert sum(rows) == len(PROMPTS) + sum(len(c) for row in CANDIDATES for c in row)


def test_latents_are_computed_once_for_any_number_of_prompts(model, batch):
    """By `generate` in every way it has and by `score`; cross-attention's keys of a clip once for all candidates."""
    calls = {"chunks": 0, "latents": []}
    hooks = [
        model.chunk_encoder.register_forward_hook(lambda *_: calls.update(chunks=calls["chunks"] + 1)),
        model.text.blocks[0].cross_attention.key_value.register_forward_hook(
            lambda module, given, out: calls["latents"].append(len(given[0]))
        ),
    ]
    text, media = inputs(), {name: batch[name] for name in MEDIA}
    prompts = {name: text[name] for name in ("decoder_input_ids", "decoder_attention_mask")}
    ways = [{}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}]
    for number, way in enumerate(ways, start=1):
        model.generate(**media, **prompts, max_new_tokens=2, min_new_tokens=2, **({"do_sample": False} | way))
        assert calls["chunks"] == number
    latents = encoded(model, batch)
    for way in ways:
        model.generate(encoder_outputs=latents, **prompts, max_new_tokens=2, **({"do_sample": False} | way))
    calls["latents"].clear()
    model.score(latents, **text)
    assert calls == {"chunks": len(ways) + 1, "latents": [3]}
    for hook in hooks:
        hook.remove()


def test_a_stream_is_scored_like_its_clip(model, batch):
    clips = {name: batch[name][:1] for name in MEDIA}
    stream = model.stream()
    for t in range(4):
        stream.append(clips["video"][:, t], clips["audio"][:, t])
    text = inputs(PROMPTS[:2], CANDIDATES[:2])
    whole = model.score(encoded(model, clips), **text)
    torch.testing.assert_close(model.score(stream.encoder_outputs, **text).total, whole.total, **TOLERANCE)


def test_what_cannot_be_scored_is_refused(model, batch):
    latents, text = encoded(model, batch), inputs()
    with pytest.raises(UserError, match="candidate 0 of row 1 is empty"):
        model.score(latents, **inputs(candidates=[CANDIDATES[0], [[]], *CANDIDATES[2:]]))
    with pytest.raises(UserError, match="no candidate"):
        model.score(latents, **inputs(candidates=[[], *CANDIDATES[1:]]))
    with pytest.raises(UserError, match="4 prompts for 3 clips"):
        model.score(latents, **inputs(PROMPTS[:4], CANDIDATES[:4]))
    with pytest.raises(UserError, match="do not fit"):
        model.score(latents, **{name: value[:3] if "candidate" in name else value for name, value in text.items()})
    gap = text["candidate_mask"].clone()
    gap[0, 2, 1] = False
    with pytest.raises(UserError, match="gap"):
        model.score(latents, **text | {"candidate_mask": gap})
