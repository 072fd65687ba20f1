"""What a model weighs and what it computes, by component: parameter counts and closed forms of the forward FLOPs."""

import math
from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from mirasol.config.model import MirasolConfig
from mirasol.config.parts import StackConfig
from mirasol.model.cache import narrower
from mirasol.model.token_turing import process_stack

COMPONENTS = (
    "vit", "tubes", "audio", "combiner", "latent", "reconstruction", "text", "cross_attention", "vocabulary",
)  # fmt: skip

# The first prefix that fits a parameter's or module's name says whose it is.
_PREFIXES = {
    "chunk_encoder.tubes": "tubes",
    "chunk_encoder.vit": "vit",
    "chunk_encoder.shared_output": "vit",
    "chunk_encoder.video_output": "vit",
    "chunk_encoder.missing_video": "vit",
    "chunk_encoder.": "audio",
    "combiner": "combiner",
    "latent": "latent",
    "reconstruction": "reconstruction",
    "text.embedding": "vocabulary",
    "text.output": "vocabulary",
    "text.latent_input": "cross_attention",
    "text": "text",
    # The projection of images too: it has no other use than to meet the text's.
    "contrastive": "text",
}


def component_of(name: str) -> str:
    """The component that a parameter or submodule of the model belongs to, by its dotted name."""
    if name.startswith("text.blocks.") and ".cross_" in name:
        return "cross_attention"
    return next(component for prefix, component in _PREFIXES.items() if name.startswith(prefix))


def count_parameters(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Parameters by component, in the order of `COMPONENTS`; they sum to the whole."""
    counts = Counter()
    for name, parameter in named:
        counts[component_of(name)] += parameter.numel()
    return {component: counts[component] for component in COMPONENTS}


def linear_flops(rows: int, inputs: int, outputs: int) -> int:
    """A multiplication and an addition for each weight and row."""
    return 2 * rows * inputs * outputs


def attention_flops(stack: StackConfig, queries: int, keys: int, batch: int = 1, cached: int = 0) -> int:
    """Projections, scores and weighted sums of `batch` sequences; `cached` keys, beside the others, were projected
    before. Masked scores count: a dense kernel computes them."""
    inner = stack.heads * stack.head_width
    per_query = linear_flops(queries, stack.width, inner) + linear_flops(queries, inner, stack.width)
    per_key = linear_flops(keys, stack.width, 2 * inner)
    return batch * (per_query + per_key + 2 * linear_flops(queries, keys + cached, inner))


def feed_forward_flops(stack: StackConfig, rows: int) -> int:
    """Two linears, the first twice as wide when gated."""
    return linear_flops(rows, stack.width, stack.hidden) * (3 if stack.gated else 2)


def stack_flops(stack: StackConfig, tokens: int, batch: int = 1, queries: int | None = None, cached: int = 0) -> int:
    """A stack over `batch` sequences; its last block computes outputs for `queries` of the tokens only, and each block
    looks at `cached` earlier tokens as well."""

    def block(wanted: int) -> int:
        return attention_flops(stack, wanted, tokens, batch, cached) + feed_forward_flops(stack, batch * wanted)

    return (stack.depth - 1) * block(tokens) + block(tokens if queries is None else queries)


def flops(config: MirasolConfig, chunks: int, text_length: int) -> dict[str, int]:
    """Forward FLOPs by component for one clip and one text row, the losses' predictions included: the next latents,
    the reconstruction, and logits for every token. Grows with chunks² in the attention over all chunks."""
    video, audio, text = config.video, config.audio, config.text
    width, vit_width, adapter = config.combiner.stack.width, config.vit.width, audio.adapter
    seen, heard = chunks * video.tokens, chunks * audio.tokens
    more, separate = int(config.vit.class_token), audio.backbone == "separate"
    vit = stack_flops(config.vit, video.tokens + more, chunks) + linear_flops(seen, vit_width, width)
    heard_width = adapter.width if separate else vit_width
    heard_flops = linear_flops(heard, audio.patch[0] * audio.patch[1], heard_width)
    heard_flops += stack_flops(adapter, audio.tokens, chunks)
    if not separate:
        vit += stack_flops(config.vit, audio.tokens + more, chunks)
        vit += linear_flops(heard, vit_width, width) if audio.shared_projection else 0
    if not audio.shared_projection:
        heard_flops += linear_flops(heard, adapter.width, width)
        heard_flops += linear_flops(heard, heard_width, adapter.width) if adapter.width != heard_width else 0
    latents = chunks * config.combiner.m
    return {
        "vit": vit,
        "tubes": sum(
            linear_flops(chunks * math.prod(tube.grid(video.frames_per_chunk, video.image_size)),
                         3 * math.prod(tube.kernel), vit_width)
            for tube in video.tubes
        ),
        "audio": heard_flops,
        "combiner": combiner_flops(config, chunks),
        "latent": stack_flops(config.latent.stack, latents) + linear_flops(latents, width, width),
        "reconstruction": _reconstruction_flops(config, chunks),
        "text": stack_flops(text.stack, text_length),
        "cross_attention": _cross_attention_flops(config, latents, text_length),
        "vocabulary": linear_flops(text_length, text.stack.width, text.vocab_size),
    }  # fmt: skip


def combiner_flops(config: MirasolConfig, chunks: int) -> int:
    """The Combiner over the features of all chunks: linear in the chunks for the scope `chunk` and for the Token
    Turing Machine, quadratic otherwise."""
    combiner, tokens = config.combiner, config.video.tokens + config.audio.tokens
    m, stack = combiner.m, combiner.stack
    if combiner.kind == "concat":
        return 0
    if combiner.kind == "ttm":
        return chunks * _token_turing_flops(config, tokens)
    # One sequence of all chunks, or one sequence a chunk.
    batch, length = (chunks, 1) if combiner.scope == "chunk" else (1, chunks)
    if combiner.kind == "perceiver":
        layer = attention_flops(stack, length * m, length * (tokens + m), batch)
        return stack.depth * (layer + feed_forward_flops(stack, chunks * m))
    tokens += m if combiner.kind == "cls" else 0
    return stack_flops(stack, length * tokens, batch, queries=length * m)


def stream_flops(config: MirasolConfig, past: int, window: int | None = None) -> dict[str, int]:
    """FLOPs by component of one more chunk of a stream with that window, after `past` chunks. What is computed of the
    chunk alone is constant; attention to the past grows with it, up to the windows."""
    alone, combiner, latent = flops(config, 1, 1), config.combiner, config.latent

    def seen(own: int | None) -> int:
        widest = narrower(own, window)
        return past if widest is None else min(past, widest - 1)

    looks_back = combiner.kind not in ("ttm", "concat") and combiner.scope == "past"
    return {
        **{component: alone[component] for component in ("vit", "tubes", "audio")},
        "combiner": _combiner_step_flops(config, seen(combiner.window) if looks_back else 0),
        "latent": stack_flops(latent.stack, combiner.m, cached=seen(latent.window) * combiner.m),
    }


def _combiner_step_flops(config: MirasolConfig, past: int) -> int:
    """The Combiner over one chunk that sees so many earlier ones."""
    combiner, tokens = config.combiner, config.video.tokens + config.audio.tokens
    m, stack = combiner.m, combiner.stack
    if combiner.kind in ("ttm", "concat"):
        return combiner_flops(config, 1)
    if combiner.kind == "perceiver":
        layer = attention_flops(stack, m, tokens + m, cached=past * tokens)
        return stack.depth * (layer + feed_forward_flops(stack, m))
    tokens += m if combiner.kind == "cls" else 0
    return stack_flops(stack, tokens, queries=m, cached=past * tokens)


def _token_turing_flops(config: MirasolConfig, tokens: int) -> int:
    ttm, width = config.combiner.ttm, config.combiner.stack.width

    def learner(seen: int, picked: int) -> int:
        scores = linear_flops(seen, width, ttm.learner_hidden) + linear_flops(seen, ttm.learner_hidden, picked)
        return scores + linear_flops(picked, seen, width)

    seen = ttm.memory_tokens + tokens
    read, write = learner(seen, ttm.read_tokens), learner(seen + ttm.read_tokens, ttm.memory_tokens)
    output = linear_flops(width, ttm.read_tokens, ttm.hidden) + linear_flops(width, ttm.hidden, config.combiner.m)
    return read + stack_flops(process_stack(config), ttm.read_tokens) + write + output


def _reconstruction_flops(config: MirasolConfig, chunks: int) -> int:
    settings, audio = config.reconstruction, config.audio
    queries, heard = math.prod(settings.grid(config.video.frames_per_chunk)), audio.tokens if settings.audio else 0
    stack = stack_flops(settings.stack, config.combiner.m + queries + heard, chunks, queries + heard)
    pixels = linear_flops(chunks * queries, settings.stack.width, 3 * math.prod(settings.patch))
    return stack + pixels + linear_flops(chunks * heard, settings.stack.width, math.prod(audio.patch))


def _cross_attention_flops(config: MirasolConfig, latents: int, text_length: int) -> int:
    text, latent_width = config.text, config.latent.stack.width
    layer = attention_flops(text.stack, text_length, latents)
    if text.cross_attention_ffn:
        layer += feed_forward_flops(text.stack, text_length)
    projection = linear_flops(latents, latent_width, text.stack.width) if latent_width != text.stack.width else 0
    return len(text.cross_attention_layers) * layer + projection
