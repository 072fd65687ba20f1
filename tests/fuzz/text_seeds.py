"""Small inputs that are not media, as folders (file name → content): annotations, shards, predictions, recipes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

Folder = dict[str, bytes]
REPOSITORY = Path(__file__).resolve().parents[2]
ID, OTHER = "-1X2N5XJ_kw", "---g-f_I2yQ"
EPIC = "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,stop_sample"
NEXT = "video,frame_count,width,height,question,answer,qid,type"


def _encode(files: dict[str, object]) -> Folder:
    """Texts as they are, other values as JSON."""
    encoded = {}
    for name, content in files.items():
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        encoded[name] = content.encode() if isinstance(content, str) else content
    return encoded


def list_annotations() -> dict[tuple[str, str], Folder]:
    """Data sets in each of their formats: (data set, variant) → files. The media are empty files."""
    qa = [
        {"answer": "couch", "category_id": 14, "id": 1, "question": "what is it they sit on?", "video_id": 6513},
        {"answer": "man", "category_id": 3, "id": 2, "question": "who is singing?", "video_id": 6514},
    ]
    lines = "".join(
        json.dumps({"answer": r["answer"], "question": r["question"], "video_id": f"video{r['video_id']}"}) + "\n"
        for r in qa
    )
    own = [
        {"id": "a1", "file": "a.mp4", "prompt": "what plays?", "target": "a bell", "start": 0.5, "end": 2.5,
         "question_type": "hearing", "candidates": ["a bell", "a drum"]},
        {"file": "b.mp4", "prompt": "what?", "target": "red", "start": None, "end": None},
    ]  # fmt: skip
    questions = [{"video_name": ID, "question": "are all men", "question_id": f"v_{ID}_{n}"} for n in range(3)]
    answers = [{"answer": "no", "type": n + 3, "question_id": f"v_{ID}_{n}"} for n in range(3)]
    epic = "P01_11_0,P01,P01_11,00:00:02.069,00:00:02.993,49656,71832,clang / clatter,rustle,0\n"
    mc = "7,9,9,9,why,1,0,CW,a,b,c,d,e\n7,9,9,9,what next,2,1,TN,a,b,c,d,e\n"
    folders: dict[tuple[str, str], dict[str, object]] = {
        ("folder", "jsonl"): {"test.jsonl": "".join(json.dumps(r) + "\n" for r in own), "a.mp4": "", "b.mp4": ""},
        ("folder", "csv"): {
            "test.csv": "file,prompt,target,start,end,candidates\na.mp4,what?,red,0,1.5,red|blue\na.mp4,how?,so,,,\n",
            "a.mp4": "",
        },
        ("msrvtt_qa", "json"): {"val_qa.json": qa, "video6513.mp4": "", "video6514.mp4": ""},
        ("msrvtt_qa", "jsonl"): {"val.jsonl": lines, "video6513.mp4": ""},
        ("msrvtt_qa", "csv"): {"test.csv": "video,question,answer,qid,type\n6513,what is it,couch,1,14\n"},
        ("msrvtt_qa", "hqga"): {
            "hqga_val.csv": "question,answer,category_id,video_id,id,type\nwhat is it,couch,14,6513,1,0\n"
        },
        ("activitynet_qa", ""): {"test_q.json": questions, "test_a.json": answers, f"v_{ID}.mp4": ""},
        ("nextqa_mc", ""): {
            "test.csv": f"{NEXT},a0,a1,a2,a3,a4\n{mc}",
            "map_vid_vidorID.json": {"7": "0101/7"},
            "0101/7.mp4": "",
        },
        ("nextqa_oe", ""): {
            "test.csv": f"{NEXT}\n1,1,2,3,why,so,0,CW\n2,1,2,3,how,thus,1,CH\n",
            "add_reference_answer_test.json": {"1": {"0": "thus"}},
            "1.mp4": "",
        },
        ("vggsound", ""): {
            "vggsound.csv": f'{ID},30,"vehicle horn, honking",test\n{OTHER},1,people marching,train\n',
            "stat.csv": '"vehicle horn, honking",900,vehicle\npeople marching,1050,people',
            f"{ID}_000030.mp4": "",
        },
        ("epic_sounds", ""): {
            "EPIC_Sounds_train.csv": f"{EPIC},description,class,class_id\n{epic}",
            "EPIC_Sounds_recognition_test_timestamps.csv": f"{EPIC}\n{epic.rsplit(',', 3)[0]}\n",
            "classes.csv": "class_id,class\n0,rustle\n1,water\n",
            "P01_11.mp4": "",
        },
        ("kinetics_sound", ""): {
            "kinetics-400_val.csv": "label,youtube_id,time_start,time_end,split,is_cc\n"
            f'"blowing nose",{ID},1,11,val,0\n',
            f"{ID}_000001_000011.mp4": "",
        },
        ("audioset", ""): {
            "eval_segments.csv": "# a\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
            f'{ID}, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n',
            "class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man"\n',
            f"{ID}_30.mp4": "",
        },
        ("webvid", ""): {
            "results_2M_val.csv": 'videoid,name,page_idx,page_dir,duration,contentUrl\n1001,"rocks, water",1,0_50,'
            "PT00H00M03S,http://x/a\n1002,a bell,1,0_50,PT00H00M03S,http://x/b\n",
            "0_50/1001.mp4": "",
        },
        ("videocc", ""): {
            "video_cc_public.csv": f"https://www.youtube.com/watch?v={ID},2500000,7500000,a bell\n{OTHER},9,3,late\n",
            f"{ID}.mp4": "",
        },
        ("image_text", "csv"): {
            "dev.csv": 'url,caption\nhttp://x/a%20b.jpg,"half a ""pamplemousse"""\n',
            "images/a b.jpg": "",
        },
        ("image_text", "tsv"): {"Train_GCC-training.tsv": "a bus\thttp://x/bus.jpg?size=2\n", "bus.jpg": ""},
        ("image_text", "paths"): {"pairs_test.csv": "filepath,title\nimages/cat.png,a cat\n", "images/cat.png": ""},
    }  # fmt: skip
    return {key: _encode(files) for key, files in folders.items()}


def list_shards() -> dict[tuple[str, str], Folder]:
    """Tars of samples, with statistics beside them."""
    media = {"mp4": b"\0\0\0\x18ftypisom" + bytes(200), "jpg": b"\xff\xd8\xff\xe0" + bytes(100)}
    made = {}
    for dataset, extension in (("video2dataset", "mp4"), ("img2dataset", "jpg")):
        members = {}
        for key in ("00000000", "00000001", "00000002"):
            members[f"{key}.{extension}"] = media[extension]
            members[f"{key}.txt"] = b"a bell"
            members[f"{key}.json"] = json.dumps({"key": key, "status": "success", "caption": "a bell"}).encode()
        stats = {"count": 3, "status_dict": {"success": 3}}
        made[dataset, "tar"] = _encode({"00000.tar": make_tar(members), "00000_stats.json": stats})
        made[dataset, "files"] = _encode({f"00000/{name}": content for name, content in members.items()})
    return made


def make_tar(members: Folder) -> bytes:
    """A tar of these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def make_own_shards(folder: Path, clip: bytes) -> dict[tuple[str, str], Folder]:
    """Shards as `mirasol data shard` writes them, of two clips."""
    from mirasol.data.shards.write import Sharding, shard_dataset

    root = folder / "data"
    if not (folder / "shards" / "manifest.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        rows = [{"file": f"{k % 2}.mp4", "prompt": f"what {k}?", "target": "red"} for k in range(3)]
        (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(2):
            (root / f"{number}.mp4").write_bytes(clip + bytes(number))
        shard_dataset("folder", root, folder / "shards", sharding=Sharding(clips_per_shard=1))
    files = (path for path in sorted((folder / "shards").rglob("*")) if path.is_file())
    return {("shards", ""): {path.relative_to(folder / "shards").as_posix(): path.read_bytes() for path in files}}


def list_predictions() -> dict[tuple[str, str], Folder]:
    """A data set and a file of predictions for it, in every format."""
    annotations = list_annotations()
    activity, choice = annotations["activitynet_qa", ""], annotations["nextqa_mc", ""]
    open_ended, epic = annotations["nextqa_oe", ""], annotations["epic_sounds", ""]
    sounds = annotations["vggsound", ""]
    ids = [f"v_{ID}_{n}" for n in range(3)]
    matrix = io.BytesIO()
    np.save(matrix, np.array([[0.1, 0.9]]))
    challenge = {
        "version": "0.1", "challenge": "audio_based_interaction_recognition", "sls_pt": 1, "sls_tl": 1, "sls_td": 1,
        "t_mod": 2, "results": {"P01_11_0": {"interaction": {"0": 0.5, "1": 0.1}}},
    }  # fmt: skip
    rows = "".join(json.dumps({"id": key, "answer": "no"}) + "\n" for key in ids)
    made = {
        ("activitynet_qa", "json"): _encode({"pred.json": [{"question_id": key, "answer": "no"} for key in ids]}),
        ("activitynet_qa", "jsonl"): _encode({"pred.jsonl": rows}),
        ("nextqa_mc", "json"): _encode({"pred.json": {"7_0": {"prediction": 1}, "7_1": {"prediction": 2}}}),
        ("nextqa_mc", "scores"): _encode({"pred.json": [{"id": "7_0", "scores": [0, 1, 2.5, -1, 0]}]}),
        ("nextqa_oe", "json"): _encode({"pred.json": {"1": {"0": "so"}, "2": {"1": "x"}}}),
        ("epic_sounds", "json"): _encode({"pred.json": challenge}),
        ("vggsound", "npy"): {"pred.npy": matrix.getvalue()},
    }
    bases = {"activitynet_qa": activity, "nextqa_mc": choice, "nextqa_oe": open_ended, "epic_sounds": epic}
    return {key: {**bases.get(key[0], sounds), **files} for key, files in made.items()}


def list_recipes() -> dict[tuple[str, str], Folder]:
    """The recipes of the repository."""
    files = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
    return {("recipe", file.relative_to(REPOSITORY).as_posix()): {"recipe.yaml": file.read_bytes()} for file in files}


def make_checkpoint(folder: Path) -> Folder:
    """A checkpoint of a very small model without training."""
    if not (folder / "tokenizer.json").is_file():
        import torch
        import transformers

        from mirasol import MirasolConfig, MirasolFeatureExtractor, MirasolForConditionalGeneration, MirasolProcessor
        from mirasol.media.tokenizer import train_tokenizer

        transformers.logging.disable_progress_bar()
        tokenizer = train_tokenizer(["what colour is the circle?", "red", "a bell rings twice"] * 4, 300)
        config = MirasolConfig.preset("tiny", text={"vocab_size": len(tokenizer)})
        torch.manual_seed(3)
        MirasolForConditionalGeneration(config).save_pretrained(folder)
        MirasolProcessor(MirasolFeatureExtractor.for_config(config), tokenizer).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
