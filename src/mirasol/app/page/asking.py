"""What happens between the page and the server's service: the same caps, decoders and batches as the API's."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

from mirasol.app.page.drawing import draw_answer, draw_candidates, draw_timeline, draw_trouble
from mirasol.app.server.answerer import Answerer, Stopping
from mirasol.app.server.asking import AnswerSoFar, encode_prompt, follow_answer, is_sure
from mirasol.app.server.clips import read_clip
from mirasol.app.server.messages import Conversation, MediaPart, hash_content
from mirasol.app.server.parameters import check_text
from mirasol.app.server.questions import Choosing
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.routes import check_candidates, score_candidates
from mirasol.app.server.service import Service
from mirasol.errors import UserError
from mirasol.explain import Explanation, explain
from mirasol.media.clip import Clip

Shown = tuple[str, str, str]  # HTML of the answer, the candidates and the timeline
MOST_CHUNKS = 64  # of a clip whose answer is explained: its model runs about twice for each
AT_ONCE = 16


async def answer_on_page(
    service: Service, folder: Path, paths: Sequence[str], question: str, candidates: str
) -> AsyncIterator[Shown]:
    """What the page shows while a question is answered, and then. Trouble is shown in words, and nothing is raised.

    folder: where uploads are; a path elsewhere is refused. paths: of one upload. candidates: one a line, or none
    """
    try:
        async with aclosing(_follow(service, folder, paths, question, candidates)) as shown:
            async for each in shown:
                yield each
    except (Refusal, UserError) as error:
        yield draw_trouble(str(error)), "", ""
    except Stopping:
        yield draw_trouble("the server is being stopped"), "", ""
    except Exception as error:
        service.journal.write("bug", error=f"page: {type(error).__name__}: {error}"[:500])
        yield draw_trouble("an error of the server: its log says which"), "", ""


async def _follow(
    service: Service, folder: Path, paths: Sequence[str], question: str, candidates: str
) -> AsyncIterator[Shown]:
    part = await asyncio.to_thread(check_upload, folder, paths, service.settings.caps.max_body)
    if not question.strip():
        raise Refusal(400, "no question: type one")
    prompt = check_text(question.strip(), "question")
    listed = [line.strip() for line in candidates.splitlines() if line.strip()]
    options = check_candidates(listed, service.settings.caps.max_candidates) if listed else []
    yield draw_answer("", note="reading the clip"), "", ""
    ids = encode_prompt(service.answerer.processor, prompt)
    clip = await service.clips.get(Conversation(prompt, (part,)))
    so_far = AnswerSoFar()
    async with aclosing(follow_answer(service, clip.encoded, ids, Choosing(), so_far)) as pieces:
        async for _ in pieces:
            yield draw_answer(so_far.text), "", ""
    sure = is_sure(service, clip, so_far.probability)
    note = "not sure: unlike what this model was measured on, or too unlikely" if sure is False else ""
    answer = draw_answer(so_far.text, so_far.probability, note)
    bars = ""
    if options:
        bars = draw_candidates(await score_candidates(service, clip, prompt, options))
    if clip.chunks > MOST_CHUNKS:
        yield answer, bars, f'<p class="mirasol soft">no timeline for more than {MOST_CHUNKS} chunks</p>'
        return
    yield answer, bars, '<p class="mirasol soft" role="status">measuring what mattered …</p>'
    yield answer, bars, draw_timeline(await explain_part(service, part, prompt))


def check_upload(folder: Path, paths: Sequence[str], most: int) -> MediaPart:
    """The one upload as a part of a clip. Raises Refusal if it is missing, too large, not in the folder or not one."""
    if not paths:
        raise Refusal(400, "no clip: upload, record or choose one")
    if len(paths) > 1:
        raise Refusal(400, "a clip and a sound: which of them is meant? remove the other")
    found = Path(paths[0]).resolve()
    if not found.is_relative_to(folder.resolve()) or not found.is_file():
        raise Refusal(404, "this clip is no longer there: upload it again")
    if found.stat().st_size > most:
        raise Refusal(413, f"a file of {found.stat().st_size} bytes exceeds the limit of {most}")
    with found.open("rb") as file:
        return MediaPart("video", hash_content(list(iter(partial(file.read, 2**20), b""))), path=found)


async def explain_part(service: Service, part: MediaPart, prompt: str) -> Explanation:
    """Decodes a clip once more, for its pictures and sound, and explains the answer. Raises Refusal."""
    clip = await service.clips.run_decoder(read_clip, (part,))
    return await asyncio.wrap_future(service.answerer.run(_explain, service.answerer, clip, prompt))


def _explain(answerer: Answerer, clip: Clip, prompt: str) -> Explanation:
    """In the thread of the model."""
    return explain(answerer.model, answerer.processor, clip, prompt, clips_at_once=AT_ONCE)
