"""What one training step of a model that is not in memory takes: its FLOPs and its bytes, on fake tensors.

As in `mirasol.cost.counting`, PyTorch runs the step on tensors without contents, here with autograd.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mirasol.config.model import MirasolConfig
from mirasol.cost.counting import count_products
from mirasol.model.kernels import keep_activations, recompute_activations

aten = torch.ops.aten


@dataclass(frozen=True)
class StepShape:
    """The shape of a microbatch, which one process computes at once.

    clips: clips, or images for the objective `image_text`
    chunks: chunks of each clip, padding included
    questions: text rows of each clip
    text_length: tokens of each row, padding included
    target_tokens: how many of them count in the text loss, at most `text_length` - 1
    features: whether clips come as the features of frozen encoders, computed before
    """

    clips: int
    chunks: int
    questions: int
    text_length: int
    target_tokens: int
    objective: Literal["clips", "image_text"] = "clips"
    features: bool = False


@dataclass(frozen=True)
class StepCost:
    """What a forward and a backward pass over one microbatch take in one process.

    forward_flops, backward_flops: multiplications and additions of all matrix products and convolutions; gradients
        that no trained weight needs are neither computed nor counted
    recomputed_flops: what the backward pass computes a second time
    saved_bytes: what the forward pass keeps for the backward pass, without the weights
    peak_bytes: the most in memory at a time in addition to weights and optimizer: inputs, saved activations,
        intermediate results, and gradients (those of the weights only with `keep_gradients`)
    """

    forward_flops: int
    backward_flops: int
    recomputed_flops: int
    saved_bytes: int
    peak_bytes: int


def count_step_cost(
    model: nn.Module,
    shape: StepShape,
    precision: Literal["fp32", "bf16", "bf16 weights"] = "fp32",
    recomputed: str = "none",
    keep_gradients: bool = True,
    device: str = "cpu",
    compiled: bool = False,
    memory_alone: bool = False,
) -> StepCost:
    """Counts one step of a model on the `meta` device; frozen weights (`requires_grad`) get no gradients.

    precision: `bf16` is autocast over float32 weights, `bf16 weights` casts the model (what FSDP computes with)
    recomputed: what the backward pass computes again, an argument of `recompute_activations`
    keep_gradients: whether the gradients of the weights stay (one process, DDP) or leave at once (FSDP)
    device: whose rules for autocast and attention apply; `cuda` needs a GPU here
    compiled: as if each layer were compiled: counted with the kernels that the compiler is given, so that what it
        computes again by its own choice counts as kept
    memory_alone: counts no FLOPs
    """
    weights = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    model = _copy_for_counting(model, weights)
    if compiled:
        keep_activations(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        batch = _make_batch(model.config, shape, device, weights)
        autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        if shape.features:
            with torch.no_grad(), autocast:
                batch["features"] = model.compute_features(*(batch.pop(name) for name in ("video", "audio")),
                                                           batch["video_mask"], batch["audio_mask"])  # fmt: skip
        step = _FakeStep(model, batch, shape, autocast)
        if memory_alone:
            recompute_activations(model, recomputed, functools.partial(checkpoint, use_reentrant=False))
            forward = backward = again = 0
        else:
            forward, backward, again = step.count_flops(recomputed)
        saved, peak = step.count_bytes(keep_gradients)
    return StepCost(forward, backward, again, saved, peak)


@dataclass(frozen=True)
class EncodingCost:
    """What frozen encoders take for one clip, without gradients: FLOPs, the most bytes in memory at a time with the
    media, and the bytes and the number of values of the features that come out."""

    flops: int
    peak_bytes: int
    feature_bytes: int
    feature_values: int


def count_encoding_cost(
    model: nn.Module, chunks: int, precision: Literal["fp32", "bf16"] = "fp32", device: str = "cpu"
) -> EncodingCost:
    """Counts the encoding of a clip by a model on the `meta` device; arguments as those of `count_step_cost`."""
    model = _copy_for_counting(model, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _AssumedContents(0):
        model.to_empty(device=device)
        batch = _make_batch(model.config, StepShape(1, chunks, 1, 1, 0), device, torch.float32)
        media = {name: batch[name] for name in ("video", "audio", "video_mask", "audio_mask")}
        live = LiveBytes([*model.parameters(), *model.buffers()], list(media.values()))
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            with count_products() as counter:
                features = list(_find_tensors(model.compute_features(**media)))
            with live:
                model.compute_features(**media)
    return EncodingCost(
        counter.get_total_flops(), live.peak, sum(f.nbytes for f in features), sum(f.numel() for f in features)
    )


def _copy_for_counting(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    model = copy.deepcopy(model).to(dtype).train()
    if model.config._attn_implementation == "flex_attention":  # has no counts: it runs on real devices only
        model.set_attn_implementation("sdpa")
    return model


def _make_batch(config: MirasolConfig, shape: StepShape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A batch without contents."""
    video, audio, rows = config.video, config.audio, shape.clips * shape.questions
    ids = torch.empty(rows, shape.text_length, dtype=torch.long, device=device)
    text = {"decoder_input_ids": ids, "decoder_attention_mask": torch.empty_like(ids), "labels": torch.empty_like(ids)}
    side = video.image_size
    if shape.objective == "image_text":
        return {"images": torch.empty(shape.clips, 3, side, side, device=device, dtype=dtype), **text}
    pixels = (shape.clips, shape.chunks, video.frames_per_chunk, 3, side, side)
    mel = (shape.clips, shape.chunks, audio.spectrogram_frames, audio.num_mel_bins)
    masks = {
        name: torch.empty(shape.clips, shape.chunks, dtype=torch.bool, device=device)
        for name in ("chunk_mask", "video_mask", "audio_mask")
    }
    media = {
        "video": torch.empty(pixels, device=device, dtype=dtype),
        "audio": torch.empty(mel, device=device, dtype=dtype),
    }
    return {**media, **masks, **text}


class _FakeStep:
    """One step on fake tensors, run once to count FLOPs and once to count bytes."""

    def __init__(self, model: nn.Module, batch: dict[str, Any], shape: StepShape, autocast: torch.autocast):
        self.model, self.batch, self.autocast = model, batch, autocast
        self.compute: Callable[..., Any] = model.image_text if shape.objective == "image_text" else model
        self.targets = _AssumedContents(shape.clips * shape.questions * shape.target_tokens)

    def compute_loss(self) -> Tensor:
        with self.autocast:
            return self.compute(**self.batch).loss

    def count_flops(self, recomputed: str) -> tuple[int, int, int]:
        """FLOPs of the forward pass, of the backward pass, and of the recomputation in the latter."""
        again = 0

        def checkpoint_and_count(function: Callable, *inputs: Any) -> Any:
            calls = 0

            def call(*inputs: Any) -> Any:
                nonlocal again, calls
                calls += 1
                before = counter.get_total_flops()
                try:
                    return function(*inputs)
                finally:  # PyTorch stops a recomputation by an exception once it has all it needs
                    again += counter.get_total_flops() - before if calls > 1 else 0

            return checkpoint(call, *inputs, use_reentrant=False)

        recompute_activations(self.model, recomputed, checkpoint_and_count)
        with count_products() as counter, self.targets:
            loss = self.compute_loss()
            forward = counter.get_total_flops()
            loss.backward()
            total = counter.get_total_flops()
        self.model.zero_grad(set_to_none=True)
        return forward, total - forward - again, again

    def count_bytes(self, keep_gradients: bool) -> tuple[int, int]:
        """Bytes that autograd saves for the backward pass, without weights and inputs; and the most bytes in memory at
        a time, with inputs and gradients, without weights."""
        weights, saved = [*self.model.parameters(), *self.model.buffers()], 0
        inputs = list(_find_tensors(self.batch))
        live = LiveBytes(weights, inputs)
        with contextlib.ExitStack() as stack:
            if not keep_gradients:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        stack.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
            stack.enter_context(live)
            stack.enter_context(self.targets)
            loss, saved = count_saved_bytes(self.compute_loss, [*weights, *inputs])
            loss.backward()
        return saved, live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def count_saved_bytes(forward: Callable[[], Tensor], ignored: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The output of `forward`, and the bytes that autograd saves for its backward pass: every storage once, without
    those of the `ignored` tensors."""
    packed: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    # What was saved for nothing is gone by now (checkpoints do so), and its address may be used again.
    kept = [tensor for reference in packed if (tensor := reference()) is not None]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in ignored:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return result, sum(storages.values())


class _AssumedContents(TorchDispatchMode):
    """Answers questions about contents that fake tensors do not have: a boolean mask selects `count` target tokens,
    and every test of a value (for invalid input) is false."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.index.Tensor and _is_mask(args[1]):
            return args[0].new_empty((self.count, *args[0].shape[args[1][0].ndim :]))
        if func is aten._index_put_impl_.default and _is_mask(args[1]):
            return args[0]
        if func is aten.index_put.default and _is_mask(args[1]):
            return torch.empty_like(args[0])
        if func is aten._local_scalar_dense.default:
            return False
        return func(*args, **(kwargs or {}))


def _is_mask(indices: list[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


class LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is freed; `peak` is the most bytes at a time."""

    def __init__(self, outside: list[Tensor], inputs: list[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        for tensor in outside:
            self._begin(tensor, counts=False)
        for tensor in inputs:
            self._begin(tensor)

    def _begin(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes() if counts else 0
        weakref.finalize(storage, self._end, key).atexit = False
        self.live += self.sizes[key]
        self.peak = max(self.peak, self.live)

    def _end(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in _find_tensors(result):
            self._begin(tensor)
        return result


def _find_tensors(result: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
