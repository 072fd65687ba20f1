"""What every data set becomes: examples, each a clip (or a window of it), a prompt and a target."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt about one clip and the target text the model should give.

    `media` is a path relative to the data set's root. `start` and `end` are seconds on the media's own timeline; None
    means the clip's own start or end. A path that goes through a tar, `00000.tar/00000003.mp4`, names its member
    (`media_files.open_media_file`). `candidates` holds every answer that a blind guesser has to consider (empty where
    answers are open), so chance is 1 / len(candidates).

    id: the data set's own id of the question or clip, unique within the split
    media: "" where the annotation is there and the media is not
    target: "" where the data set publishes no answers for the split
    video: the data set's name of the video; questions of one video are not independent of each other
    references: all texts that are right, `target` among them, where there are several: second reference answers, the
        labels of a clip that has more than one
    answer_index: place of the right one among `candidates`, which may hold equal texts
    random_target: training draws its target among `references` each time the example comes up
    """

    id: str
    media: str
    start: float | None
    end: float | None
    prompt: str
    target: str
    question_type: str = ""
    candidates: tuple[str, ...] = ()
    video: str = ""
    references: tuple[str, ...] = ()
    answer_index: int | None = None
    random_target: bool = False

    def __setstate__(self, state: list) -> None:
        # The dataclass's own looks up the fields of every object, which took most of a batch's way between processes.
        for name, value in zip(self.__slots__, state, strict=True):
            object.__setattr__(self, name, value)

    @property
    def video_name(self) -> str:
        """What intervals and plots group by: the video's name, or its file where the data set has no names."""
        return self.video or self.media

    @property
    def type_name(self) -> str:
        """The question type as scores and logs name it; "untyped" where there is none."""
        return self.question_type or "untyped"


@dataclass(frozen=True)
class ClipExamples:
    """All examples about one clip: the same media file and the same window in seconds."""

    media: str
    start: float | None
    end: float | None
    examples: tuple[Example, ...]

    @property
    def video_name(self) -> str:
        """The video's name, which stays with it where its media file is packed or moved."""
        return self.examples[0].video_name


def group_by_clip(examples: Iterable[Example]) -> list[ClipExamples]:
    """Gathers examples that share (media, start, end), so that one encoding serves them all.

    Clips come in the order of their first example, examples in the order they were given.
    """
    groups: dict[tuple[str, float | None, float | None], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.media, example.start, example.end), []).append(example)
    return [ClipExamples(*window, tuple(members)) for window, members in groups.items()]
