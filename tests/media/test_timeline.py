"""How a span of seconds is cut into chunks."""

import itertools

import pytest

from mirasol import UserError
from mirasol.media.timeline import ChunkGrid, cut_into_chunks, describe_cut


@pytest.mark.parametrize(
    ("seconds", "chunks"), [(0.04, 1), (0.5, 1), (0.74, 1), (0.75, 2), (1.25, 3), (4.0, 8), (4.02, 8), (32.0, 64)]
)
def test_number_of_fixed_chunks_is_the_duration_rounded_half_up_and_at_least_one(seconds, chunks):
    timeline = cut_into_chunks(0.0, seconds, ChunkGrid(4, chunk_seconds=0.5))
    assert timeline.num_chunks == chunks
    assert timeline.edges == tuple(k * 0.5 for k in range(chunks + 1))


def test_edges_of_fixed_chunks_are_exact_multiples_from_the_start():
    timeline = cut_into_chunks(1.3, 100.0, ChunkGrid(2, chunk_seconds=0.32, max_chunks=1000))
    assert all(edge == 1.3 + k * 0.32 for k, edge in enumerate(timeline.edges))


def test_a_longer_clip_gets_max_chunks_longer_chunks_and_a_note():
    grid = ChunkGrid(4, chunk_seconds=0.5, max_chunks=8)
    timeline = cut_into_chunks(0.0, 10.0, grid)
    assert timeline.num_chunks == 8
    assert timeline.edges[-1] == 10.0
    assert all(b - a == pytest.approx(1.25) for a, b in itertools.pairwise(timeline.edges))
    assert "longer than 8 chunks" in describe_cut(timeline, grid)[0]


def test_a_fixed_number_of_chunks_covers_the_span_exactly():
    timeline = cut_into_chunks(2.0, 5.0, ChunkGrid(8, num_chunks=7))
    assert (timeline.num_chunks, timeline.edges[0], timeline.edges[-1]) == (7, 2.0, 5.0)
    assert describe_cut(timeline, ChunkGrid(8, num_chunks=7)) == []


def test_what_lies_beyond_the_last_chunk_or_the_end_is_noted():
    grid = ChunkGrid(4, chunk_seconds=0.5)
    assert "last 0.200 s are ignored" in describe_cut(cut_into_chunks(0, 2.2, grid), grid)[0]
    assert "0.200 s past the end" in describe_cut(cut_into_chunks(0, 2.3, grid), grid)[0]
    assert describe_cut(cut_into_chunks(0, 2.0, grid), grid) == []


def test_frame_times_are_centres_of_equal_cells_inside_their_chunk():
    timeline = cut_into_chunks(1.0, 2.0, ChunkGrid(4, chunk_seconds=0.5))
    assert timeline.frame_times[0] == pytest.approx((1.0625, 1.1875, 1.3125, 1.4375))
    times = [time for chunk in timeline.frame_times for time in chunk]
    assert all(b - a == pytest.approx(0.125) for a, b in itertools.pairwise(times))


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_seconds": None},
        {"chunk_seconds": 0.5, "num_chunks": 4},
        {"chunk_seconds": 0.0},
        {"chunk_seconds": float("nan")},
        {"num_chunks": 0},
        {"chunk_seconds": 0.5, "max_chunks": 0},
    ],
)
def test_impossible_grids_are_refused(settings):
    with pytest.raises(UserError):
        ChunkGrid(4, **settings)


@pytest.mark.parametrize(("start", "end"), [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_span_without_length_is_refused(start, end):
    with pytest.raises(UserError, match="end must be after start"):
        cut_into_chunks(start, end, ChunkGrid(4, chunk_seconds=0.5))
