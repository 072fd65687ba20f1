import dataclasses
import itertools

import numpy as np
import pytest

from mirasol.synthetic.render import DOT_GREY, render_frames, render_sound, render_waveform, write_clip
from mirasol.synthetic.scenes import Scene, ShapeEvent, make_scene
from mirasol.synthetic.worlds import SIGNS_AND_SIGNALS, WORLDS, World

SHIFT = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
EVERY_WORLD = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed) for seed in range(30)]


@pytest.fixture(scope="module")
def signs():
    return [make_scene(seed, SIGNS_AND_SIGNALS) for seed in range(30)]


def coloured(frame: np.ndarray) -> np.ndarray:
    """Pixels that belong to a shape: bright, and saturated or white, unlike background, grain and grey dot."""
    values = frame.astype(int)
    return ((values.max(-1) - values.min(-1) > 70) | (values.min(-1) > 160)) & (values.max(-1) > 130)


def nearest_colour(frame: np.ndarray, world: World) -> str:
    mean = frame[coloured(frame)].mean(axis=0)
    return min(world.colours, key=lambda colour: np.abs(mean - world.colours[colour]).sum())


def centre(frame: np.ndarray) -> np.ndarray:
    """(x, y) of the shape in fractions of the frame."""
    rows, columns = np.nonzero(coloured(frame))
    return np.array([columns.mean() / frame.shape[1], rows.mean() / frame.shape[0]])


def shown(scene: Scene, event: ShapeEvent) -> list[int]:
    times = np.arange(round(scene.seconds * scene.style.frame_rate)) / scene.style.frame_rate
    return np.flatnonzero((times >= event.onset) & (times < event.offset)).tolist()


def decode(path) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Frames, waveform of the first channel, its start in seconds and its sample rate."""
    import av

    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        blocks = list(container.decode(audio=0))
    wave = np.concatenate([block.to_ndarray()[0] for block in blocks])
    return frames, wave, float(blocks[0].time), blocks[0].sample_rate


def test_the_same_scene_gives_the_same_pixels_and_samples(scenes):
    for scene in scenes[:3]:
        assert np.array_equal(render_frames(scene), render_frames(make_scene(scene.seed)))
        assert np.array_equal(render_waveform(scene), render_waveform(make_scene(scene.seed)))


def test_shapes_and_ranges(scenes):
    for scene in scenes[:8]:
        style = scene.style
        frames, waveform = render_frames(scene), render_waveform(scene)
        assert frames.shape == (scene.slots * style.frame_rate, style.height, style.width, 3)
        assert frames.dtype == np.uint8
        assert waveform.shape == (style.channels, scene.slots * style.sample_rate)
        assert waveform.dtype == np.float32
        assert np.abs(waveform).max() <= 1


def test_every_shape_shows_its_colour_and_moves_its_way_in_each_half_of_its_slot(scenes):
    for scene in scenes:
        frames = render_frames(scene)
        for event in scene.shapes:
            visible = shown(scene, event)
            assert {nearest_colour(frames[index], scene.world) for index in visible} == {event.colour}
            middle = event.slot + 0.5
            for lo, hi in ((event.slot, middle), (middle, event.slot + 1)):
                half = [index for index in visible if lo <= index / scene.style.frame_rate < hi]
                moved = centre(frames[half[-1]]) - centre(frames[half[0]])
                along, across = moved @ SHIFT[event.motion], moved @ SHIFT[event.motion][::-1]
                assert along > 0.08
                assert abs(across) < 0.03


def test_every_sign_shows_its_colour_and_its_motion_in_each_half_of_its_slot(signs):
    for scene in signs:
        frames = render_frames(scene)
        for event in scene.shapes:
            visible = shown(scene, event)
            assert {nearest_colour(frames[index], scene.world) for index in visible} == {event.colour}
            middle = event.slot + 0.5
            for lo, hi in ((event.slot, middle), (middle, event.slot + 1)):
                half = [index for index in visible if lo <= index / scene.style.frame_rate < hi]
                places = np.array([centre(frames[index]) for index in half])
                areas = [coloured(frames[index]).sum() for index in half]
                sideways, upright = np.ptp(places, axis=0)
                assert (sideways > 0.2) == (event.motion == "swinging")
                assert (upright > 0.2) == (event.motion == "hopping")
                if event.motion in ("growing", "shrinking"):
                    ratio = areas[-1] / areas[0]
                    assert ratio > 1.3 if event.motion == "growing" else ratio < 1 / 1.3


def test_no_sign_is_cut_by_the_border_of_the_frame(signs):
    for scene in signs:
        frames = render_frames(scene)
        for event in scene.shapes:
            for index in shown(scene, event):
                mask = coloured(frames[index])
                assert not mask[[0, -1]].sum() > 6 and not mask[:, [0, -1]].sum() > 6


def test_shapes_are_about_a_third_of_the_frame_and_never_cut_by_its_border(scenes):
    for scene in scenes[:15]:
        frames = render_frames(scene)
        for event in scene.shapes:
            areas = [coloured(frames[index]).sum() for index in shown(scene, event)]
            assert min(areas) > 0.9 * max(areas)
            rows = np.nonzero(coloured(frames[shown(scene, event)[0]]).any(axis=1))[0]
            assert 0.28 < (rows[-1] - rows[0] + 1) / min(scene.style.height, scene.style.width) < 0.5


@EVERY_WORLD
def test_the_four_shapes_differ_at_32_pixels(scenes, world):
    silhouettes = {}
    for shape in world.shapes:
        scene = scenes[0]
        looks = {"shape": shape, "colour": next(iter(world.colours)), "motion": list(world.motions)[2]}
        event = dataclasses.replace(scene.shapes[0], **looks, size=0.4)
        frame = render_frames(dataclasses.replace(scene, shapes=(event,), world=world))[shown(scene, event)[0]]
        mask = coloured(frame)
        rows, columns = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        small = np.linspace(0, len(box) - 1, 10).round().astype(int)
        wide = np.linspace(0, box.shape[1] - 1, 10).round().astype(int)
        silhouettes[shape] = box[np.ix_(small, wide)]
    for one, other in itertools.combinations(world.shapes, 2):
        assert (silhouettes[one] != silhouettes[other]).mean() > 0.1


def test_nothing_coloured_is_seen_where_no_shape_is(scenes):
    for scene in scenes:
        frames = render_frames(scene)
        busy = {index for event in scene.shapes for index in shown(scene, event)}
        idle = [index for index in range(len(frames)) if index not in busy]
        assert not any(coloured(frames[index]).any() for index in idle)


def test_the_dot_drifts_through_the_whole_clip(scenes):
    scene = dataclasses.replace(scenes[3], shapes=())
    frames = render_frames(scene).astype(int)
    grey = np.abs(frames - DOT_GREY).max(axis=-1) < 12
    assert grey.any(axis=(1, 2)).all()
    first, last = (np.argwhere(grey[index]).mean(axis=0) for index in (0, len(frames) // 3))
    assert np.abs(first - last).max() > 2


def test_sounds_are_heard_in_their_slots_and_nowhere_else(scenes, signs):
    for scene in [*scenes, *signs]:
        waveform, rate = render_waveform(scene)[0], scene.style.sample_rate
        for slot in range(scene.slots):
            for half in (slot, slot + 0.5):
                part = waveform[round(half * rate) : round((half + 0.5) * rate)]
                loudness = np.sqrt(np.mean(part**2))
                assert loudness > 0.028 if scene.find_sound(slot) else loudness < 0.015


def spectrum(sound: np.ndarray, rate: int) -> np.ndarray:
    """What a coarse ear hears: log power in 24 log-spaced bands, and how strongly the loudness comes and goes."""
    count = len(sound) // (rate // 100) * (rate // 100)
    envelope = np.sqrt((sound[:count].reshape(-1, rate // 100) ** 2).mean(axis=1))
    power = np.abs(np.fft.rfft(sound)) ** 2
    edges = np.geomspace(60, 7500, 25) * len(sound) / rate
    bands = np.array([power[int(lo) : int(hi) + 1].sum() for lo, hi in itertools.pairwise(edges)])
    bands = np.log(bands / bands.sum() + 1e-4)
    return np.append(bands, 8 * envelope.std() / envelope.mean())


@EVERY_WORLD
def test_half_a_second_tells_timbre_and_pitch(world):
    kinds = list(itertools.product(world.timbres, world.pitches))
    features, labels = [], []
    for seed in range(60):
        scene = make_scene(seed)
        rate = scene.style.sample_rate
        for kind, (timbre, pitch) in enumerate(kinds):
            event = dataclasses.replace(scene.sounds[0], timbre=timbre, pitch=pitch)
            sound = render_sound(event, rate, world)
            for part in np.split(sound[: len(sound) // 2 * 2], 2):
                features.append(spectrum(part, rate))
                labels.append(kind)
    features, labels = np.array(features), np.array(labels)
    means = np.stack([features[: len(features) // 2][labels[: len(labels) // 2] == kind].mean(0) for kind in range(8)])
    unseen = features[len(features) // 2 :]
    guesses = np.linalg.norm(unseen[:, None] - means, axis=-1).argmin(axis=1)
    assert (guesses == labels[len(labels) // 2 :]).mean() > 0.97


def test_the_file_holds_what_was_rendered_at_the_time_it_was_rendered(scenes, signs, tmp_path):
    pytest.importorskip("av")
    for scene in [*scenes[:10], *signs[:5]]:
        path = tmp_path / f"{scene.seed}.mp4"
        write_clip(scene, path)
        frames, wave, start, rate = decode(path)
        assert rate == scene.style.sample_rate
        rendered, source = render_frames(scene), render_waveform(scene)[0]
        assert frames.shape == rendered.shape
        assert np.abs(frames.astype(int) - rendered).mean() < 4
        for event in scene.shapes:
            middle = shown(scene, event)[len(shown(scene, event)) // 2]
            assert nearest_colour(frames[middle], scene.world) == event.colour
        # Where the decoded sound fits best: within a millisecond of where it was rendered.
        count = min(len(wave), len(source))
        size = 1 << (2 * count - 1).bit_length()
        product = np.fft.irfft(np.fft.rfft(wave[:count], size) * np.conj(np.fft.rfft(source[:count], size)), size)
        lag = int(product.argmax())
        lag = lag - size if lag > size // 2 else lag
        assert abs(lag / rate + start) < 0.001


def test_the_same_scene_gives_the_same_bytes(scenes, tmp_path):
    pytest.importorskip("av")
    for name in ("a.mp4", "b.mp4"):
        write_clip(scenes[1], tmp_path / name)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
