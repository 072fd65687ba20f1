"""OpenAI's own client, unchanged, and what it is answered."""

import base64
import json

import openai
import pytest
from PIL import Image
from serving import file, make_data_url, text, video, wait_until
from untrained import only_stream

from mirasol.app.server.chat import map_symbols_to_bytes, read_token_bytes
from mirasol.app.server.parameters import check_fields
from mirasol.app.server.refusals import Refusal
from mirasol.media.inputs.conversation import join_turns

LAST = "which shape is seen last?"
COLOUR = "what colour is the circle?"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_the_client_lists_the_model_and_asks(client, clips, answer_alone):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    for clip in clips[:2]:
        alone = answer_alone(clip, LAST)
        messages = [{"role": "user", "content": [video(clip), text(LAST)]}]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, logprobs=True, top_logprobs=3, n=1, user="me", max_completion_tokens=20
        )
        assert answer.choices[0].message.content == alone.text
        assert answer.choices[0].finish_reason == "stop"
        assert answer.mirasol["probability"] == pytest.approx(alone.probability, rel=1e-3)
        assert answer.mirasol["clip"]["chunks"] > 5
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        tokens = answer.choices[0].logprobs.content
        assert len(tokens) == answer.usage.completion_tokens
        assert b"".join(bytes(token.bytes) for token in tokens).decode().strip() == alone.text
        for token in tokens:
            assert [token.logprob, token.token] == [token.top_logprobs[0].logprob, token.top_logprobs[0].token]
            assert len(token.top_logprobs) == 3 and token.logprob <= 0


def test_the_client_streams(client, clips, answer_alone):
    messages = [{"role": "user", "content": [video(clips[0]), text(LAST)]}]
    events = list(
        client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert said == answer_alone(clips[0], LAST).text
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[-1].usage.completion_tokens >= 1 and not events[-1].choices
    assert len({event.id for event in events}) == 1


def test_files_are_uploaded_once_and_asked_about(client, served, clips, answer_alone):
    others = set(served.service.folder.glob("file-*"))
    uploaded = client.files.create(file=clips[1], purpose="user_data")
    assert uploaded.bytes == clips[1].stat().st_size and uploaded.filename == clips[1].name
    before = served.answerer.run(lambda: None)  # and the file's latents are there before the first question
    before.result(60)
    for prompt in (LAST, COLOUR):
        messages = [{"role": "user", "content": [file(uploaded.id), text(prompt)]}]
        answer = client.chat.completions.create(model="tiny", messages=messages)
        assert answer.choices[0].message.content == answer_alone(clips[1], prompt).text
    assert uploaded.id in [each.id for each in client.files.list()]
    assert client.files.retrieve(uploaded.id).purpose == "user_data"
    assert client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError, match="no such file"):
        client.files.retrieve(uploaded.id)
    assert set(served.service.folder.glob("file-*")) == others


def test_several_turns_are_read_as_the_processor_reads_them(client, clips, answer_alone):
    first = answer_alone(clips[0], COLOUR).text
    messages = [
        {"role": "user", "content": [text(COLOUR), video(clips[0])]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": LAST},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages)
    alone = answer_alone(clips[0], join_turns([(COLOUR, first)], LAST))
    assert answer.choices[0].message.content == alone.text
    assert answer.mirasol["probability"] == pytest.approx(alone.probability, rel=1e-3)
    later = [text(LAST), video(clips[0])]  # media in a later turn are the same clip
    messages = [{"role": "user", "content": COLOUR}, messages[1], {"role": "user", "content": later}]
    assert client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content == alone.text


def test_sound_and_pictures_come_as_parts(served, clips, tmp_path):

    sound = only_stream("audio", clips[0], tmp_path / "sound.mp4")
    heard = {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(sound.read_bytes()).decode(), "format": "aac"},
    }
    assert served.ask([heard, text("what plays?")]).json()["choices"][0]["message"]["content"]
    silent = only_stream("video", clips[0], tmp_path / "silent.mp4")
    both = served.ask([video(silent), heard, text("what plays?")]).json()
    whole = served.ask([video(clips[0]), text("what plays?")]).json()
    assert both["choices"][0]["message"] == whole["choices"][0]["message"]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    picture = {
        "type": "image_url",
        "image_url": {"url": make_data_url(tmp_path / "red.png", "image/png"), "detail": "low"},
    }
    answer = served.ask([picture, text(COLOUR)])
    assert answer.status_code == 200 and answer.json()["mirasol"]["clip"]["chunks"] == 2
    number = served.upload(tmp_path / "red.png", kind="image/png").json()["id"]
    assert served.ask([file(number), text(COLOUR)]).json()["choices"] == answer.json()["choices"]


def test_answers_end_where_they_are_told_to(served, clips):
    content = [video(clips[0]), text("what colour is the circle?")]
    whole = served.ask(content).json()["choices"][0]["message"]["content"]
    stopped = served.ask(content, stop=[whole[2:4]]).json()["choices"][0]
    assert stopped["message"]["content"] == whole[:2] and stopped["finish_reason"] == "stop"
    unsure = [content[0], text("zzz of what nobody knows")]
    drawn = [served.ask(unsure, temperature=2, max_tokens=3, seed=seed).json() for seed in (1, 1, *range(2, 9))]
    texts = [one["choices"][0]["message"]["content"] for one in drawn]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    assert {one["choices"][0]["finish_reason"] for one in drawn} <= {"stop", "length"}


def test_scores_are_those_of_the_model(served, clips, answer_alone):
    fields = {"candidates": ["circle", "square", "cross", "triangle"]}
    messages = [{"role": "user", "content": [video(clips[0]), text(LAST)]}]
    scored = served.client.post("/v1/score", json={"messages": messages, **fields}).json()["data"]
    assert scored[0]["candidate"] == answer_alone(clips[0], LAST).text
    assert sum(one["share"] for one in scored) == pytest.approx(1)
    assert scored[0]["probability"] == pytest.approx(answer_alone(clips[0], LAST).probability, rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"mood": "good"}, "mood"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields, param):
    with pytest.raises(Refusal, match=param) as refused:
        check_fields({"messages": [], **fields})
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_changes_nothing_is_accepted():
    harmless = {"user": "me", "metadata": {}, "store": False, "n": 1, "presence_penalty": 0.0, "tools": None}
    assert check_fields({"model": "tiny", "response_format": {"type": "text"}, **harmless}) == {"model": "tiny"}


def linked(url: str, kind: str = "video_url") -> list[dict]:
    return [{"type": kind, kind: {"url": url}}, text("what?")]


BAD = {
    "no messages": ({"messages": []}, 400),
    "no media": ({"content": "hi?"}, 400),
    "no text": ({"content": linked("data:video/mp4;base64,AAAA")[:1]}, 400),
    "other model": ({"content": "hi?", "model": "gpt-4"}, 404),
    "not a video": ({"content": linked("data:text/html;base64,AAAA")}, 415),
    "not media": ({"content": linked("data:video/mp4;base64,AAAA")}, 422),
    "not base64": ({"content": linked("data:image/png;base64,$", "image_url")}, 400),
    "other scheme": ({"content": linked("file:///etc/passwd")}, 400),
    "other host": ({"content": linked("http://example.org/a.mp4")}, 400),
    "no such file": ({"content": [file("file-" + "0" * 32)]}, 404),
    "path for a file": ({"content": [file("../../etc/passwd")]}, 404),
    "part of no kind": ({"content": [{"type": {"text": "x"}}, {"type": ["file"]}]}, 400),
    "hot": ({"content": "hi?", "temperature": 3}, 400),
    "too long": ({"content": "hi?", "max_tokens": 10**6}, 400),
    "temperature of a word": ({"content": "hi?", "temperature": "warm"}, 400),
    "stream of a word": ({"content": "hi?", "stream": "yes"}, 400),
}


@pytest.mark.parametrize(("fields", "status"), BAD.values(), ids=BAD)
def test_what_cannot_be_answered_is_refused_in_one_line(served, fields, status):
    fields = dict(fields)
    answer = served.ask(fields.pop("content", None), **fields)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and "\n" not in error["message"] and "/tmp" not in error["message"]


def test_half_of_a_surrogate_pair_is_refused(served):
    body = rb'{"messages": [{"role": "user", "content": "what \ud800?"}]}'
    answer = served.client.post("/v1/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.json()
    answer = served.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content")


def test_the_clients_errors_are_its_own(client, served):
    with pytest.raises(openai.BadRequestError, match="no media") as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello?"}])
    assert refused.value.code == "missing_media" and refused.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve("gpt-4")
    assert served.client.post("/v1/embeddings", json={}).status_code == 404


def test_no_question_is_written_down(served, clips):
    before = len(served.lines)
    served.ask([video(clips[0]), text("a question that nobody else should read")])
    served.client.get("/v1/files/somebody's secret path")

    def find(route: str, status: int) -> list[dict]:
        return [line for line in served.lines[before:] if (line.get("route"), line.get("status")) == (route, status)]

    # A line follows its answer, so that the client may be first.
    wait_until(lambda: find("/v1/files", 404) and find("/v1/chat/completions", 200))
    assert find("/v1/chat/completions", 200)[-1]["bytes_in"] > clips[0].stat().st_size
    lines = served.lines
    assert "nobody" not in json.dumps(lines) and "secret" not in json.dumps(lines)
    assert 'mirasol_requests_total{route="/v1/files",status="404"}' in served.client.get("/metrics").text


def test_bytes_of_tokens_are_those_of_the_text(answerer):
    assert sorted(map_symbols_to_bytes().values()) == list(range(256))
    tokenizer = answerer.processor.tokenizer
    ids = tokenizer(" a dark blue café", add_special_tokens=False)["input_ids"]
    joined = b"".join(read_token_bytes(answerer.processor, each) for each in ids)
    assert joined.decode().strip() == "a dark blue café"
    assert read_token_bytes(answerer.processor, tokenizer.eos_token_id) is None
