"""Mirasol as a model of lmms-eval: `python -m lmms_eval --model mirasol --model_args pretrained=DIR --tasks …`.

lmms-eval finds `make_manifest` through the entry point `lmms_eval.models`; nothing else here is imported by Mirasol.
"""

import contextlib
import re
import tempfile
import wave
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from mirasol.checkpoint import load_checkpoint
from mirasol.errors import BadClip, UserError
from mirasol.evaluation.answer import MAX_NEW_TOKENS, answer_clips, encode_clips, eval_mode, score_clips

OPTION = re.compile(r"\(?([A-Z])[.):]\s+(\S.*)")
# What tasks ask generation for and greedy decoding does not have, with the values that it does have.
GREEDY = {"do_sample": (False, None), "num_beams": (1, None)}


def split_options(context: str) -> tuple[str, dict[str, str]]:
    """The question in a task's context, and its options by letter; {} where it has none.

    Options are consecutive lines `A. text`, `(A) text` or `A) text` from A on. The question is the last line before
    them; of a context without options it is the first line. Other lines are instructions for chat models.
    """
    lines = [line.strip() for line in context.splitlines() if line.strip()]
    options: dict[str, str] = {}
    first = len(lines)
    for place, line in enumerate(lines):
        match = OPTION.fullmatch(line)
        if match and match[1] == chr(ord("A") + len(options)):
            first = min(first, place)
            options[match[1]] = match[2].strip()
    if len(options) < 2 or first == 0:
        return (lines[0] if lines else ""), {}
    return lines[first - 1], options


class MirasolLmms(lmms):
    """A checkpoint that answers lmms-eval's requests, each video or audio file being encoded once for all of its
    questions.

    pretrained: a checkpoint, as `mirasol ask` takes it
    prompt: `question` asks as the model was trained to be asked: the question alone, and where the context lists
        options, the letter of the likeliest one (log-likelihood per token, as `mirasol evaluate` scores candidates);
        `full` gives the model the complete context and returns what it writes
    on_bad_clip: `error` stops at media that cannot be read; `skip` answers "" and says how many there were

    Raises UserError for other arguments, and for a checkpoint that cannot be used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        batch_size: int | str | None = 1,
        prompt: Literal["question", "full"] = "question",
        on_bad_clip: Literal["error", "skip"] = "error",
        **others: Any,
    ):
        super().__init__()
        others = {name: value for name, value in others.items() if name != "max_batch_size"}
        if others:
            raise UserError(f"model_args: unknown {', '.join(others)}: give pretrained, prompt or on_bad_clip")
        if not pretrained:
            raise UserError("model_args: give pretrained=DIR, a checkpoint of Mirasol")
        for name, value, known in (
            ("prompt", prompt, ("question", "full")),
            ("on_bad_clip", on_bad_clip, ("error", "skip")),
        ):
            if value not in known:
                raise UserError(f"model_args: {name}={value}: choose {' or '.join(known)}")
        if str(batch_size) != "1":
            raise UserError(f"--batch_size {batch_size}: set 1; all questions about one file are answered together")
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        chosen = torch.device(device) if device and alone else self.accelerator.device
        if chosen.type == "cuda" and not torch.cuda.is_available():
            chosen = torch.device("cpu")
        loaded = load_checkpoint(pretrained, chosen)
        self.model, self.processor = loaded.model, loaded.processor
        self.prompt, self.on_bad_clip, self.bad = prompt, on_bad_clip, []

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers results of several processes there."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        return self._answer_by_media(requests, "generate_until")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each continuation its log-likelihood, <eos> included, and whether greedy decoding would write it."""
        return self._answer_by_media(requests, "loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: the model was not trained on conversations."""
        raise UserError("tasks of several rounds are not supported: mirasol answers single questions")

    def _answer_by_media(self, requests: list[Instance], kind: str) -> list[Any]:
        """The answer to every request; requests about one file are answered together."""
        groups: dict[Any, list[int]] = defaultdict(list)
        media: dict[Any, Any] = {}
        for place, request in enumerate(requests):
            _, _, doc_to_visual, doc_id, task, split = request.args
            visual = _choose_visual(doc_to_visual(self.task_dict[task][split][doc_id]), task)
            key = visual if isinstance(visual, str) else (task, split, doc_id)
            media[key] = visual
            groups[key].append(place)
        results: list[Any] = [None] * len(requests)
        with eval_mode(self.model), tempfile.TemporaryDirectory() as folder:
            for key, places in tqdm(groups.items(), desc="mirasol", disable=self._rank != 0):
                own = [requests[place].args for place in places]
                for place, result in zip(places, self._answer_media(media[key], own, kind, Path(folder)), strict=True):
                    self.cache_hook.add_partial(kind, requests[place].args[:2], result)
                    results[place] = result
        if self.bad:
            logger.warning(f"{len(self.bad)} media files cannot be read and are answered with nothing: {self.bad}")
        return results

    def _answer_media(self, visual: Any, own: Sequence[tuple], kind: str, folder: Path) -> list[Any]:
        extractor = self.processor.feature_extractor
        try:
            with _open_visual(visual, folder) as path:
                clip = extractor.tensors(extractor.read(path))
        except (BadClip, OSError) as error:
            if self.on_bad_clip == "error":
                raise UserError(f"{error}: repair the file, or give model_args on_bad_clip=skip") from error
            self.bad.append(str(visual))
            return [(-float("inf"), False) if kind == "loglikelihood" else ""] * len(own)
        encoded = encode_clips(self.model, self.processor, [clip])
        if kind == "loglikelihood":
            return [self._score(clip, encoded, context, text) for context, text, *_ in own]
        return self._answer(clip, encoded, own)

    def _answer(self, clip: Mapping[str, Any], encoded: Any, own: Sequence[tuple]) -> list[str]:
        """The answers to one clip's questions: the letters of options by score, all other texts generated together."""
        answers, open_questions, longest = [""] * len(own), {}, MAX_NEW_TOKENS
        for place, (context, wanted, *_) in enumerate(own):
            for name, known in GREEDY.items():
                if wanted.get(name) not in known:
                    raise UserError(f"generation_kwargs {name}={wanted[name]}: mirasol decodes greedily, leave it out")
            question, options = split_options(context)
            if self.prompt == "question" and options:
                texts = list(options.values())
                [[scores]] = score_clips(self.model, self.processor, encoded, [[question]], [[texts]])
                answers[place] = list(options)[int(np.argmax(scores))]
                continue
            open_questions[place] = context if self.prompt == "full" else question
            longest = int(wanted.get("max_new_tokens") or MAX_NEW_TOKENS)  # a task has one for all its questions
        if open_questions:
            [written] = answer_clips(
                self.model, self.processor, [clip], [list(open_questions.values())], max_new_tokens=longest,
                encoded=encoded,
            )  # fmt: skip
            for place, answer in zip(open_questions, written, strict=True):
                answers[place] = _cut_at(answer.text, own[place][1].get("until") or [])
        return answers

    def _score(self, clip: Mapping[str, Any], encoded: Any, context: str, target: Any) -> tuple[float, bool]:
        text = str(target).strip()
        question = split_options(context)[0] if self.prompt == "question" else context
        batch = self.processor.candidates([question], [[text]]).to(self.model.device)
        with torch.inference_mode():
            total = float(self.model.score(encoded, **batch).total[0, 0])
        longest = batch["candidate_ids"].shape[-1]
        [[answer]] = answer_clips(
            self.model, self.processor, [clip], [[question]], max_new_tokens=longest, encoded=encoded
        )
        return total, answer.text == text


def _cut_at(answer: str, until: str | Sequence[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        answer = answer.partition(stop)[0] if stop else answer
    return answer


def _choose_visual(visuals: Any, task: str) -> Any:
    """The one video, audio or image that a request is about."""
    found = [visual for visual in visuals or [] if visual is not None]
    if len(found) != 1:
        raise UserError(f"task {task}: {len(found)} media for a question: mirasol takes one video, audio or image")
    return found[0]


@contextlib.contextmanager
def _open_visual(visual: Any, folder: Path) -> Iterator[Path]:
    """A file with what a task gives: a path, a PIL image, or sound as {"array", "sampling_rate"}."""
    if isinstance(visual, str | Path):
        yield Path(visual)
        return
    path = folder / ("sound.wav" if isinstance(visual, Mapping) else "image.png")
    if isinstance(visual, Mapping) and {"array", "sampling_rate"} <= visual.keys():
        samples = np.asarray(visual["array"], dtype=np.float64)
        samples = samples.mean(axis=int(np.argmin(samples.shape))) if samples.ndim == 2 else samples
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, int(visual["sampling_rate"]), 0, "NONE", ""))
            file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    elif hasattr(visual, "save"):
        visual.save(path)
    else:
        raise UserError(f"media of type {type(visual).__name__}: give a path, an image, or audio with its rate")
    yield path
    path.unlink()


def make_manifest() -> Any:
    """What lmms-eval registers: the model's name and class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mirasol", simple_class_path=f"{__name__}.{MirasolLmms.__name__}")
