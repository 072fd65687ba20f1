"""From a checkpoint's name to a model ready to answer. Every defect of a checkpoint is reported in one line.

Finding a checkpoint needs the standard library only; PyTorch and transformers are imported to load one.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mirasol.errors import UserError, quote_text
from mirasol.files import hash_file
from mirasol.hub import MODEL, find_on_hub
from mirasol.json_values import InvalidJson, parse_json

if TYPE_CHECKING:
    import torch

    from mirasol.config.model import MirasolConfig
    from mirasol.media.processor import MirasolProcessor
    from mirasol.media.tokenizer import AnsweringProcessor
    from mirasol.model.hf import MirasolForConditionalGeneration
    from mirasol.model.mirasol import MirasolAnswerer

Processor = TypeVar("Processor", bound="MirasolProcessor | AnsweringProcessor")
SHIPPED = ("tiny",)
WEIGHTS = "model.safetensors"
STARTING_WEIGHTS = "starting_weights.json"  # what `mirasol init` records
TRAINING = "training.json"  # how the weights were trained
CALIBRATION = "calibration.json"  # below which probability an answer is "not sure"; `mirasol evaluate --calibrate`
PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # what tokenizer.json alone describes
DTYPES = ("float16", "bfloat16", "float32", "float64")  # of saved weights, as config.json names them


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint: the model in evaluation mode, its processor, and their folder.

    Of `load_answerer` a `MirasolAnswerer` and an `AnsweringProcessor`: what answering needs of them.
    """

    model: MirasolForConditionalGeneration
    processor: MirasolProcessor
    folder: Path


def find_shipped_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that comes with the package; None if it is not installed."""
    folder = Path(str(importlib.resources.files("mirasol"))) / "checkpoints" / name
    return folder if (folder / "config.json").is_file() else None


def find_checkpoint(name: str | Path) -> Path:
    """The folder of the checkpoint with this name.

    `tiny` is the one shipped with the package (a folder of that name is `./tiny`); any other name is a folder: of a
    checkpoint, of a finished run (its `checkpoint`), or of a demo (its `finetuned/checkpoint` or
    `train/checkpoint`); or else a repository of the hub (`mirasol.hub`).

    Raises:
        UserError: no such folder or repository, or it contains no checkpoint.
    """
    if str(name) in SHIPPED:
        shipped = find_shipped_checkpoint(str(name))
        if shipped is None:
            raise UserError(f"checkpoint {name!r} is not part of this installation: install mirasol again")
        return shipped
    folder = find_on_hub(name, MODEL) or Path(name)
    if not folder.exists():
        raise UserError(
            f"{folder}: no such checkpoint: give a folder, one of the shipped ones ({', '.join(SHIPPED)}), or a name "
            "on the hub (org/name)"
        )
    inside = ("checkpoint", "finetuned/checkpoint", "train/checkpoint")
    for candidate in (folder, *(folder / name for name in inside)):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder}: unfinished run: resume it with `--resume`, or export what there is with `mirasol export`"
        )
    raise UserError(f"{folder}: not a checkpoint: it has no config.json")


def load_checkpoint(name: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Loads a checkpoint (see `find_checkpoint`) in float32, ready to answer.

    Only safetensors are read: other weight files can run code when they are opened.

    Raises:
        UserError: not a Mirasol checkpoint, another checkpoint format, weights that are missing, pickled, unknown or
            of the wrong shape (named), no tokenizer, or a processor that does not fit the model.
    """
    import torch

    from mirasol.model.hf import MirasolForConditionalGeneration

    folder = find_checkpoint(name)
    config = read_config(folder)
    _check_weights(folder, config)
    model = MirasolForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return Loaded(model.to(device).eval(), _load_processor(folder, config), folder)


def load_answerer(name: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Loads a checkpoint as `load_checkpoint` does, to answer with it: the same numbers, but neither `generate` nor the
    rest of transformers' modelling, whose import takes longer than all else.

    Checkpoints that only transformers can load, with quantised weights, another attention or a tokenizer of its own
    kind, are loaded by `load_checkpoint`.

    Raises:
        UserError: as `load_checkpoint`.
    """
    folder = find_checkpoint(name)
    config = read_config(folder)
    tokenizer = _read_metadata(folder / "tokenizer_config.json").get("tokenizer_class")
    is_plain = getattr(config, "quantization_config", None) is None and config._attn_implementation in (None, "sdpa")
    if not is_plain or tokenizer not in PLAIN_TOKENIZERS:
        return load_checkpoint(name, device)
    from safetensors.torch import load_file

    model = _check_weights(folder, config)
    model.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()}, assign=True)
    return Loaded(model.to(device).eval(), _load_answering_processor(folder, config), folder)


def read_weights_hash(folder: Path) -> str:
    """SHA-256 of the checkpoint's weights, as recorded by its training, or else computed."""
    recorded = _read_metadata(folder / TRAINING).get("weights_sha256")
    return recorded if isinstance(recorded, str) else hash_file(folder / WEIGHTS)


@dataclass(frozen=True)
class Doubt:
    """When a checkpoint is not sure, as `mirasol evaluate --calibrate` measured it.

    threshold: below this probability of an answer
    highest_surprise: about clips that surprise the model more (`mirasol.evaluation.answer.measure_surprise`) than any
        clip it was measured on; None where that is not known
    """

    threshold: float
    highest_surprise: float | None = None

    def is_strange(self, surprise: float | None) -> bool:
        """Whether a clip of that surprise is of another kind than all that the checkpoint was measured on."""
        return self.highest_surprise is not None and surprise is not None and surprise > self.highest_surprise


def read_doubt(folder: Path) -> Doubt | None:
    """When the checkpoint is not sure; None where it was not measured, or with other weights. Raises UserError for a
    damaged file."""
    content = _read_metadata(folder / CALIBRATION)
    if not content:
        return None
    for key, optional in (("threshold", False), ("highest_surprise", True)):
        value = content.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if not (is_number and (optional or value <= 1)) and not (optional and value is None):
            raise UserError(f"{folder / CALIBRATION}: {key}={value!r} is not such a number: measure it again")
    doubt = Doubt(content["threshold"], content.get("highest_surprise"))
    return doubt if content.get("weights_sha256") == read_weights_hash(folder) else None


def read_rendered_world(folder: Path) -> str | None:
    """The name of the rendered scenes that are all a checkpoint was trained on; None where they are not all, or it is
    not recorded."""
    world = _read_metadata(folder / TRAINING).get("rendered_world")
    return world if isinstance(world, str) else None


def _read_metadata(file: Path) -> dict[str, Any]:
    """The object in a JSON file next to the weights; empty where there is none. Raises UserError for others."""
    if not file.is_file():
        return {}
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, InvalidJson) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values


def load_processor(name: str | Path) -> MirasolProcessor:
    """Loads only a checkpoint's processor, with its tokenizer. Raises UserError as `load_checkpoint` does."""
    folder = find_checkpoint(name)
    return _load_processor(folder, read_config(folder))


def read_config(folder: Path) -> MirasolConfig:
    """The config in a checkpoint's folder. Raises UserError as `load_checkpoint` does."""
    from mirasol.config.model import CHECKPOINT_FORMAT, MirasolConfig

    file = folder / "config.json"
    try:
        values: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, InvalidJson) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != MirasolConfig.model_type:
        raise UserError(f"{folder}: not a Mirasol checkpoint: its config.json has model_type {kind!r}")
    found = values.get("checkpoint_format")
    if found not in range(1, CHECKPOINT_FORMAT + 1):
        raise UserError(
            f"{folder}: checkpoint format {found}, but this version of mirasol reads 1 to {CHECKPOINT_FORMAT}: "
            f"use the version of mirasol that wrote it, or train again"
        )
    for key in ("dtype", "torch_dtype"):  # transformers looks any other text up among the names of PyTorch
        value = values.get(key)
        if value is not None and value not in DTYPES:
            raise UserError(f"{file}: {key}={quote_text(str(value))}: choose {', '.join(DTYPES)} or null")
    try:
        return MirasolConfig.from_pretrained(folder)
    except Exception as error:  # UserError, and whatever transformers raises for values of its own keys
        raise UserError(f"{file}: {' '.join(str(error).split())[:600]}") from error


@dataclass(frozen=True)
class Untrained:
    """Weights of a model that no training has changed since they were drawn at random.

    names: parameters
    rows: tables of which only the last rows are untrained, by name: the first such row
    """

    names: frozenset[str] = frozenset()
    rows: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for training.json."""
        return {"weights": sorted(self.names), "rows": dict(self.rows)}


def read_untrained(folder: Path) -> Untrained:
    """What a checkpoint's folder says of its weights: training.json of a run, starting_weights.json of `mirasol init`.

    A checkpoint without either, or of a version that did not record it, counts as trained. Raises UserError for a file
    that cannot be read.
    """
    for name in ("training.json", STARTING_WEIGHTS):
        file = folder / name
        if not file.is_file():
            continue
        try:
            facts = parse_json(file.read_text(encoding="utf-8"))
            if name == STARTING_WEIGHTS:
                rows = {e["target"]: int(e["untrained_from"]) for e in facts["loaded"] if "untrained_from" in e}
                return Untrained(frozenset(entry["target"] for entry in facts["random"]), rows)
            known = facts.get("untrained") or {"weights": [], "rows": {}}
            return Untrained(frozenset(known["weights"]), {key: int(row) for key, row in known["rows"].items()})
        except (UnicodeDecodeError, InvalidJson, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file}: does not say which weights are untrained: restore a copy of it") from error
    return Untrained()


def _check_weights(folder: Path, config: MirasolConfig) -> MirasolAnswerer:
    """The model of the config, without values, whose weights are in the folder."""
    from safetensors import SafetensorError, safe_open

    from mirasol.model.mirasol import MirasolAnswerer

    file = folder / WEIGHTS
    if not file.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f"; {pickled[0]} is not read, because a pickle can run code: save it as safetensors" if pickled else ""
        raise UserError(f"{folder}: has no {WEIGHTS}{why}")
    try:
        with safe_open(file, framework="pt") as weights:
            found = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({error})") from error
    try:
        model = MirasolAnswerer.without_values(config)
    except (RuntimeError, TypeError) as error:  # sizes whose product PyTorch cannot hold
        raise UserError(f"{folder / 'config.json'}: no model can be made of it: {quote_text(str(error))}") from error
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for what, keys in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys())):
        if keys:
            raise UserError(f"{file}: {what} {_list_keys(sorted(keys))}: it does not belong to the config.json there")
    for key, shape in wanted.items():
        if found[key] != shape:
            raise UserError(f"{file}: {key} has shape {list(found[key])}, its config.json says {list(shape)}")
    return model


def _list_keys(keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{len(keys)} weight{'s' * (len(keys) > 1)} ({', '.join(keys[:most])}{more})"


def _load_processor(folder: Path, config: MirasolConfig) -> MirasolProcessor:
    import mirasol.auto  # noqa: F401 - a processor finds its parts through the Auto classes
    from mirasol.media.processor import MirasolProcessor

    return _load_checked(lambda: MirasolProcessor.from_pretrained(folder, local_files_only=True), folder, config)


def _load_answering_processor(folder: Path, config: MirasolConfig) -> AnsweringProcessor:
    from transformers import PreTrainedTokenizerFast

    from mirasol.media.feature_extractor import MirasolFeatureExtractor
    from mirasol.media.tokenizer import AnsweringProcessor

    def load() -> AnsweringProcessor:
        settings = _read_metadata(folder / "processor_config.json")
        longest = {name: settings[name] for name in ("max_text_length",) if name in settings}
        extractor = MirasolFeatureExtractor.from_pretrained(folder, local_files_only=True)
        return AnsweringProcessor(
            extractor, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True), **longest
        )

    return _load_checked(load, folder, config)


def _load_checked(load: Callable[[], Processor], folder: Path, config: MirasolConfig) -> Processor:
    """The processor that `load` returns, with every error in one line, and checked against the model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}: save the processor with the model")
    try:
        processor = load()
    except Exception as error:  # transformers' and tokenizers' own: AttributeError, RecursionError, bare Exception
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: its processor cannot be loaded: {reason}") from error
    if processor.max_text_length == config.text.max_length:  # saved when the fixed code had a limit, too
        processor.max_text_length = config.text.longest_text
    _check_processor(folder, config, processor)
    return processor


def _check_processor(folder: Path, config: MirasolConfig, processor: Processor) -> None:
    """Refuses a processor whose chunks, scaling or vocabulary differ from those the model was trained with."""
    for name, wanted in config.media_settings().items():
        found = getattr(processor.feature_extractor, name, None)
        if found != wanted:
            raise UserError(
                f"{folder}: its processor has {name}={found!r}, but its config.json says {wanted!r}: "
                f"use both from one checkpoint"
            )
    tokens = len(processor.tokenizer)
    if tokens > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokens} tokens, but its config.json says vocab_size={config.vocab_size}: "
            f"use both from one checkpoint"
        )
