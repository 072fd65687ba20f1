"""Clips and text to model-ready tensors, after the conventions of transformers.

`MirasolFeatureExtractor` turns media into chunk tensors, `MirasolProcessor` adds the tokenizer. Both save and load with
a checkpoint (`AutoFeatureExtractor`, `AutoProcessor`).
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from mirasol.config.parts import LONGEST_TEXT
from mirasol.errors import UserError
from mirasol.media.clip import Clip
from mirasol.media.feature_extractor import MirasolFeatureExtractor, raise_if_not_torch
from mirasol.media.inputs.arguments import gather_clips
from mirasol.media.inputs.conversation import Exchange, read_conversation, split_conversations
from mirasol.media.tokenizer import TextCoder

MEDIA_ARGUMENTS = tuple(inspect.signature(gather_clips).parameters)
PROCESSOR_OPTIONS = ("padding", "return_prompts")  # of `__call__`, which `apply_chat_template` hands on


class MirasolProcessor(TextCoder, ProcessorMixin):
    """Feature extractor and tokenizer in one: clips and text in, everything `forward` and `generate` take out.

    A row of text is <bos> prompt <sep> target <eos>, at most `max_text_length` tokens: those that the model has learned
    positions for, or many where it has a fixed code.
    """

    def __init__(
        self,
        feature_extractor: MirasolFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = LONGEST_TEXT,
    ):
        ProcessorMixin.__init__(self, feature_extractor, tokenizer)
        self.max_text_length = max_text_length

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "decoder_input_ids", "decoder_attention_mask", "labels"]

    def __call__(
        self,
        clips: Any = None,
        prompts: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        targets: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        return_tensors: str = "pt",
        return_prompts: bool = False,
        *,
        text: str | Sequence[str] | None = None,
        padding: bool | str = True,
        **media: Any,
    ) -> BatchFeature:
        """Media tensors of `clips` (paths are read completely) and text tensors of `prompts` and `targets`.

        A clip is whatever `MirasolFeatureExtractor.make_clip` takes. transformers' names are understood too: `text` for
        `prompts`, and as `media` the arguments of `mirasol.media.inputs.arguments.gather_clips` (`videos`, `audio`,
        `images`, `fps`, `sampling_rate`, `video_metadata`) for `clips`.

        With B clips, `prompts` holds one string per clip or one list of Q strings per clip; the B * Q text rows keep
        the rows of a clip together. With `return_prompts`, batches with targets also have the prompts alone,
        prompt_input_ids and prompt_attention_mask, from which `generate` answers.

        Raises:
            UserError: neither clips nor prompts, numbers that do not match, a text over `max_text_length`.
            BadClip: a file that cannot be used.
        """
        raise_if_not_torch(return_tensors)
        if padding not in (True, "longest"):
            raise UserError(
                f"padding={padding!r}: batches are always padded to their longest clip and text, leave it out"
            )
        if unknown := [name for name in media if name not in MEDIA_ARGUMENTS]:
            raise UserError(f"unknown argument {unknown[0]!r}: choose {', '.join(MEDIA_ARGUMENTS)}")
        clips = choose_given("clips", clips, "videos, audio or images", gather_clips(**media) or None)
        prompts = choose_given("prompts", prompts, "text", text)
        if clips is None and prompts is None:
            raise UserError("nothing to process: give clips, prompts or both")
        batch = BatchFeature()
        if clips is not None:
            clips = list(clips) if isinstance(clips, list | tuple) else [clips]
            batch.update(self.feature_extractor(clips))
        if prompts is not None:
            text = self.encode_text(prompts, targets)
            rows = len(text["decoder_input_ids"])
            if clips is not None and rows % len(clips):
                raise UserError(f"{rows} prompts for {len(clips)} clips: give the same number for every clip")
            batch.update(text)
            if return_prompts:
                alone = self.encode_text(prompts)
                batch["prompt_input_ids"] = alone["decoder_input_ids"]
                batch["prompt_attention_mask"] = alone["decoder_attention_mask"]
        elif targets is not None:
            raise UserError("targets were given without prompts")
        return batch

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> list[str]:
        """As in transformers, but for what a tokenizer keeps of how it was itself loaded."""
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        continue_final_message: bool = False,
        load_audio_from_video: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> str | list[str] | Tensor | BatchFeature:
        """Questions about one clip, as a conversation of transformers, or a list of such conversations.

        A conversation is a list of messages {"role": …, "content": …}; content is a text or a list of parts
        {"type": "text", "text": …}, {"type": "video", "video": …} and {"type": "audio", "audio": …}, with `path` or
        `url` as other names of the source, `fps` or `times` for frames in memory and `sampling_rate` for samples. An
        answer as the last message becomes the target; earlier turns are the first lines of the prompt. By default the
        sound of a video's file is heard.

        Returns:
            the texts; with `tokenize` their ids, and with `return_dict` too all that `forward` and `generate` take.

        Raises:
            UserError: unknown parts or options, media in some conversations only.
        """
        for name, value in {"chat_template": chat_template, **options}.items():
            if value and name not in ("add_generation_prompt", *PROCESSOR_OPTIONS):
                raise UserError(f"{name} is not supported: a text of Mirasol is <bos> question <sep> answer <eos>")
        if continue_final_message:
            raise UserError("continue_final_message is not supported: end the conversation with the question")
        conversations, is_batch = split_conversations(conversation)
        exchanges = [read_conversation(messages) for messages in conversations]
        targets = [exchange.target for exchange in exchanges]
        if len({target is None for target in targets}) > 1:
            raise UserError("some conversations end in an answer and some do not: give batches of one kind")
        if not tokenize:
            texts = [self._write_text(exchange) for exchange in exchanges]
            return texts if is_batch else texts[0]
        settings = {name: options[name] for name in PROCESSOR_OPTIONS if name in options} | (processor_kwargs or {})
        batch = self(
            self._read_exchanges(exchanges, load_audio_from_video), [exchange.prompt for exchange in exchanges],
            None if targets[0] is None else targets, **{"return_tensors": return_tensors or "pt", **settings},
        )  # fmt: skip
        return batch if return_dict else batch["decoder_input_ids"]

    def _write_text(self, exchange: Exchange) -> str:
        tokens = self.tokenizer
        text = f"{tokens.bos_token}{exchange.prompt}{tokens.sep_token}"
        return text if exchange.target is None else f"{text}{exchange.target}{tokens.eos_token}"

    def _read_exchanges(self, exchanges: list[Exchange], with_sound: bool) -> list[Clip] | None:
        if len({exchange.clip is None for exchange in exchanges}) > 1:
            raise UserError("some conversations have media and some do not: give batches of one kind")
        if exchanges[0].clip is None:
            return None
        clips = [self.feature_extractor.make_clip(exchange.clip) for exchange in exchanges]
        return [
            clip if with_sound or "audio" in exchange.clip else clip.mute()
            for clip, exchange in zip(clips, exchanges, strict=True)
        ]


def choose_given(name: str, value: Any, other_name: str, other: Any) -> Any:
    """Whichever of two arguments for the same thing was given; None if neither. Raises UserError for both."""
    if value is not None and other is not None:
        raise UserError(f"{name} and {other_name} were given: they are two names of the same, give one")
    return value if other is None else other
