import pickle
from dataclasses import replace

from mirasol.data.example import Example, group_by_clip


def example(name: str, media: str, start: float | None = None, end: float | None = None) -> Example:
    return Example(name, media, start, end, "what is it?", "red")


def test_examples_of_one_window_share_a_group_in_stable_order():
    given = [example("1", "b"), example("2", "a"), example("3", "b"), example("4", "b", 0, 1), example("5", "a")]
    groups = group_by_clip(given)
    assert [(group.media, group.start, group.end) for group in groups] == [
        ("b", None, None),
        ("a", None, None),
        ("b", 0, 1),
    ]
    assert [[member.id for member in group.examples] for group in groups] == [["1", "3"], ["2", "5"], ["4"]]


def test_a_question_without_a_type_has_a_name_for_it():
    example = Example("a", "a.mp4", None, None, "what?", "red")
    assert example.type_name == "untyped"
    assert replace(example, question_type="sight").type_name == "sight"


def test_a_pickled_example_comes_back():
    given = Example("a", "a.mp4", 0.5, None, "what?", "red", "sight", ("red", "blue"), "a", ("red",), 0, True)
    assert pickle.loads(pickle.dumps(given)) == given
