"""MSRVTT-QA, ActivityNet-QA and NExT-QA in their original formats and their variants."""

import json

import pytest

from mirasol.data.datasets.contract import AnnotationError
from mirasol.data.datasets.registry import list_splits, read_dataset

MSRVTT = [
    {"answer": "couch", "category_id": 14, "id": 158607, "question": "what is it they sit on?", "video_id": 6513},
    {"answer": "man", "category_id": 3, "id": 158608, "question": "who is singing?", "video_id": 6514},
]
HEADER_MC = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
HEADER_OE = "video,frame_count,width,height,question,answer,qid,type\n"


def kinds(dataset) -> list[tuple[str, int | None]]:
    return [(p.kind, p.line) for p in dataset.problems if p.severity == "error" and p.kind != "missing media"]


# MSRVTT-QA


def test_msrvtt_reads_the_same_questions_in_all_its_variants(data):
    data.put("TestVideo/video6513.MP4")
    data.put("videos/all/video6514.webm")
    variants = {
        "val_qa.json": json.dumps(MSRVTT, separators=(",", ":")),
        "val.jsonl": "\n".join(
            json.dumps({"answer": r["answer"], "question": r["question"], "video_id": f"video{r['video_id']}"})
            for r in MSRVTT
        ),
        "val.csv": "video,question,answer,qid,type\n"
        + "".join(f"{r['video_id']},{r['question'][:-1]},{r['answer']},{r['id']},14\n" for r in MSRVTT),
        "hqga_val.csv": "question,answer,category_id,video_id,id,type\n"
        + "".join(f"{r['question']},{r['answer']},14,{r['video_id']},{r['id']},0\n" for r in MSRVTT),
    }  # fmt: skip
    for name, content in variants.items():
        path = data.put(name, content)
        dataset = read_dataset("msrvtt_qa", data.root, "validation")
        assert dataset.annotation_files == (name,)
        found = [(e.media, e.prompt, e.target, e.question_type, e.video) for e in dataset.examples]
        assert found == [
            ("TestVideo/video6513.MP4", "what is it they sit on?", "couch", "what", "video6513"),
            ("videos/all/video6514.webm", "who is singing?", "man", "who", "video6514"),
        ]
        assert [e.id for e in dataset.examples] == (["1", "2"] if name == "val.jsonl" else ["158607", "158608"])
        path.unlink()


def test_msrvtt_prefers_the_original_and_names_a_wrong_header(data):
    data.put("val.csv", "video_id,question\n1,what\n")
    with pytest.raises(AnnotationError, match=r"val.csv, line 1, column 1: wrong header: expected .*; found video_id,"):
        read_dataset("msrvtt_qa", data.root, "val")
    data.put("val_qa.json", json.dumps(MSRVTT))
    assert read_dataset("msrvtt_qa", data.root, "val").facts["annotation_format"] == "json"


def test_msrvtt_answers_that_look_like_missing_values_are_answers(data):
    data.put("val.csv", "video,question,answer,qid,type\n1,what is there,null,1,2\n1,what,nan,2,2\n1,what,,3,2\n")
    dataset = read_dataset("msrvtt_qa", data.root, "val")
    assert [e.target for e in dataset.annotated] == ["null", "nan"]
    assert kinds(dataset) == [("empty text", 4)]


# ActivityNet-QA


def activitynet(data, questions, answers) -> None:
    data.put("test_q.json", json.dumps(questions))
    data.put("test_a.json", json.dumps(answers))


def question(number: int, video: str = "okC18bPTils") -> dict:
    return {"video_name": video, "question": "are all the people men", "question_id": f"v_{video}_{number}"}


def answer(number: int, kind: int = 3, video: str = "okC18bPTils") -> dict:
    return {"answer": "no", "type": kind, "question_id": f"v_{video}_{number}"}


@pytest.mark.parametrize("name", ["v_okC18bPTils.mkv", "okC18bPTils.mp4", "test/v_okC18bPTils.webm"])
def test_activitynet_joins_on_the_id_and_finds_both_names(data, name):
    data.put(name)
    activitynet(data, [question(1), question(2)], [answer(2, 0), answer(1, 8)])
    dataset = read_dataset("activitynet_qa", data.root, "test")
    assert [(e.id, e.media, e.question_type) for e in dataset.examples] == [
        ("v_okC18bPTils_1", name, "Other"),
        ("v_okC18bPTils_2", name, "Motion"),
    ]


def test_ids_and_video_names_may_be_numbers_or_text(data):
    data.put("v_7.mp4")
    data.put("video6513.mp4")
    activitynet(data, [{**question(1), "video_name": 7, "question_id": 12}], [{**answer(1), "question_id": "12"}])
    [example] = read_dataset("activitynet_qa", data.root, "test").examples
    assert (example.id, example.media, example.target) == ("12", "v_7.mp4", "no")
    data.put("val_qa.json", json.dumps([{**MSRVTT[0], "id": "158607", "video_id": "video6513"}]))
    [example] = read_dataset("msrvtt_qa", data.root, "val").examples
    assert (example.id, example.media) == ("158607", "video6513.mp4")


def test_activitynet_counts_every_row_that_does_not_join(data):
    data.put("v_okC18bPTils.mp4")
    activitynet(data, [question(1), question(2), question(1)], [answer(1), answer(3), answer(4, 9), answer(1)])
    dataset = read_dataset("activitynet_qa", data.root, "test")
    assert [e.id for e in dataset.examples] == ["v_okC18bPTils_1"]
    assert dataset.reasons == {"no answer": 1, "duplicate id": 1, "answer without question": 1}
    assert dataset.counts.n_annotated == 4
    assert any("type 9 is out of range: 0 to 8" in p.message and p.line == 1 for p in dataset.problems)


def test_activitynet_questions_and_answers_that_are_empty_count_once(data):
    activitynet(
        data,
        [question(1), {**question(2), "question": " "}, question(3)],
        [answer(1), answer(2), {**answer(3), "answer": ""}],
    )
    dataset = read_dataset("activitynet_qa", data.root, "test")
    assert [e.id for e in dataset.annotated] == ["v_okC18bPTils_1"]
    assert dataset.reasons == {"empty text": 2, "missing media": 1}
    assert dataset.counts.n_annotated == 3


def test_activitynet_without_answers_asks_all_the_same(data):
    data.put("test_q.json", json.dumps([question(1)]))
    dataset = read_dataset("activitynet_qa", data.root, "test")
    assert dataset.annotated[0].target == ""
    assert "test_a.json is not there" in dataset.facts["answers"]


# NExT-QA


def test_nextqa_tells_its_two_tasks_apart_by_the_header(data):
    data.put("mc/val.csv", HEADER_MC + "4010069381,369,640,480,how do they play,1,6,CH,a, b ,c,d,e\n")
    data.put("oe/val.csv", HEADER_OE + "4010069381,369,640,480,how do they play,roll it,6,CH\n")
    assert list_splits("nextqa_mc", data.root) == list_splits("nextqa_oe", data.root) == ["validation"]
    [choice] = read_dataset("nextqa_mc", data.root, "val").annotated
    assert (choice.id, choice.target, choice.answer_index) == ("4010069381_6", "b", 1)
    assert choice.candidates == ("a", "b", "c", "d", "e")
    [open_ended] = read_dataset("nextqa_oe", data.root, "val").annotated
    assert (open_ended.id, open_ended.target, open_ended.candidates) == ("4010069381_6", "roll it", ())


def test_nextqa_takes_the_answer_as_text_and_the_other_column_name(data):
    rows = "2909445186,1,2,3,why,the right,0,CW,wrong,the right,c,d,the right\n"
    data.put("val.csv", HEADER_MC.replace("video,", "video_id,", 1) + rows)
    [example] = read_dataset("nextqa_mc", data.root, "val").annotated
    assert (example.answer_index, example.video) == (1, "2909445186")


@pytest.mark.parametrize("value", ["5", "-1", "", "not an option"])
def test_nextqa_answer_out_of_range(data, value):
    data.put("val.csv", HEADER_MC + f"1,1,2,3,why,{value},0,CW,a,b,c,d,e\n1,1,2,3,why,4,1,CW,a,b,c,d,e\n")
    dataset = read_dataset("nextqa_mc", data.root, "val")
    assert kinds(dataset) == [("answer out of range", 2)]
    assert [e.answer_index for e in dataset.annotated] == [4]


@pytest.mark.parametrize("media", ["NExTVideo/0101/2909445186.mp4", "2909445186.avi"])
def test_nextqa_finds_videos_in_vidors_folders_and_flat(data, media):
    data.put("val.csv", HEADER_OE + "2909445186,1,2,3,why,so,0,CW\n")
    data.put("map_vid_vidorID.json", '{"2909445186": "0101/2909445186"}')
    data.put(media)
    assert read_dataset("nextqa_oe", data.root, "val").examples[0].media == media


def test_nextqa_open_ended_keeps_both_questions_of_one_id_in_training_alone(data):
    rows = "1,1,2,3,why,so,0,CW\n1,1,2,3,how,thus,0,CH\n"
    for split in ("train", "val"):
        data.put(f"{split}.csv", HEADER_OE + rows)
    train = read_dataset("nextqa_oe", data.root, "train")
    assert [e.id for e in train.annotated] == ["1_0", "1_0#2"] and not kinds(train)
    validation = read_dataset("nextqa_oe", data.root, "val")
    assert len(validation.annotated) == 1 and kinds(validation) == [("duplicate id", 3)]


def test_nextqa_open_ended_has_second_references_in_test(data):
    data.put("test.csv", HEADER_OE + "1,1,2,3,why,so,0,CW\n1,1,2,3,why,so,1,CW\n2,1,2,3,why,so,0,CW\n")
    assert "is not there" in read_dataset("nextqa_oe", data.root, "test").facts["second_references"]
    data.put("add_reference_answer_test.json", '{"1": {"0": "thus", "1": "so"}}')
    dataset = read_dataset("nextqa_oe", data.root, "test")
    assert [e.references for e in dataset.annotated] == [("so", "thus"), (), ()]
    data.put("add_reference_answer_test.json", '{"1": {"0": 3}}')
    with pytest.raises(AnnotationError, match="must be an object of texts"):
        read_dataset("nextqa_oe", data.root, "test")
