"""Video: every form gives the same frames, chosen over the whole clip, and every broken file a clear error."""

import contextlib
import itertools
import json
import sys

import numpy
import pytest
import torch
from PIL import Image

from nanovlm.data import images, video
from nanovlm.data.batching import pixels_of
from nanovlm.data.datasets import LlavaJson, listed_sources
from vlit_data import asked


def load(source, num_frames, sampling="uniform", seed=()):
    return video.load(video.Clip(source, num_frames, sampling, seed))


def shade(number, size=(8, 6)):
    return Image.new("RGB", size, (10 * number, 0, 200))


def shades(frames):
    """The numbers of the frames that `shade` made, as far as compression left them."""
    frames = list(frames)
    assert all(frame.mode == "RGB" for frame in frames)
    return [round(numpy.asarray(frame)[..., 0].mean() / 10) for frame in frames]


@pytest.fixture
def clips(tmp_path):
    """The same twelve frames as a folder, a list, and animations."""
    frames = [shade(number) for number in range(12)]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"frame{number}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    rest = {"save_all": True, "append_images": frames[1:], "duration": 40}
    frames[0].save(tmp_path / "a.gif", **rest)
    frames[0].save(tmp_path / "a.webp", lossless=True, **rest)
    frames[0].save(tmp_path / "a.png", **rest)
    listed = [tmp_path / "frames" / f"frame{n}.png" for n in range(12)]
    animations = [tmp_path / name for name in ("a.gif", "a.webp", "a.png")]
    return [tmp_path / "frames", str(tmp_path / "frames"), frames, listed, *animations]


def test_every_form_gives_the_same_frames_in_order(clips):
    for clip in clips:
        assert shades(load(clip, 12)) == list(range(12)), clip
        assert shades(load(clip, 4)) == [1, 4, 7, 10], "the middle of every segment"
        assert shades(load(clip, 1)) == [6]
        assert shades(load(clip, 5, "random", (3,))) == shades(load(clips[0], 5, "random", (3,)))
        assert len(load(clip, 30)) == 30 and set(shades(load(clip, 30))) == set(range(12))


def test_a_still_picture_is_a_clip_of_one_frame_and_a_folder_is_sorted_by_number(tmp_path):
    shade(3).save(tmp_path / "a.jpg", quality=100)
    assert shades(load(tmp_path / "a.jpg", 3)) == [3, 3, 3]
    transparent = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert load([transparent], 1)[0].getpixel((0, 0)) == (255, 255, 255)
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("f10.png", "f9.png", "f007.png", "g1.jpg", "F.GIF", "8.webp"):
        shade(0).save(folder / name)
    for name in ("._f9.png", ".DS_Store", "Thumbs.db"):  # what operating systems put beside them
        (folder / name).write_bytes(b"x")
    names = [path.name for path in video.frame_files(folder)]
    assert names == ["8.webp", "F.GIF", "f007.png", "f9.png", "f10.png", "g1.jpg"]


@pytest.mark.parametrize("total, wanted, expected", [
    (5, 5, [0, 1, 2, 3, 4]), (10, 5, [1, 3, 5, 7, 9]), (7, 3, [1, 3, 5]), (3, 5, [0, 0, 1, 2, 2]), (1, 2, [0, 0]),
])  # fmt: skip
def test_uniform_places(total, wanted, expected):
    assert video.uniform_places(total, wanted) == expected


@pytest.mark.parametrize("total, wanted", [(5, 5), (13, 5), (100, 7), (8, 1), (9, 8)])
def test_random_places_are_one_per_segment(total, wanted):
    """Segments differ by one frame at most, and which are longer is random: seen over many draws."""
    rng = numpy.random.default_rng(0)
    draws = [video.random_places(total, wanted, rng) for _ in range(1500)]
    assert all(places == sorted(set(places)) and len(places) == wanted for places in draws)
    for number, seen in enumerate(zip(*draws)):  # segment i begins between floor and ceiling of the shares before it
        first = number * (total // wanted) + max(0, total % wanted - (wanted - number))
        last = (number + 1) * (total // wanted) + min(total % wanted, number + 1) - 1
        assert set(seen) == set(range(first, last + 1)), number


def test_clips_that_cannot_be_used(tmp_path, monkeypatch, clips):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gif").write_bytes((tmp_path / "a.gif").read_bytes()[:300])
    (tmp_path / "bad.webp").write_text("text")
    for clip, arguments, message in (
        (tmp_path / "none.gif", {}, "none.gif: no such video"), (tmp_path / "empty", {}, "empty: it has 0 frames"),
        ([], {}, "the list of frames: it has 0 frames"), (tmp_path / "bad.gif", {"num_frames": 12}, "bad.gif: .* damaged or cut short"),
        (tmp_path / "bad.webp", {}, "bad.webp: the image is damaged"),
        (clips[0], {"num_frames": 0}, "num_frames is 0"),
        (clips[0], {"sampling": "randm"}, "unknown sampling 'randm'. Did you mean 'random'"),
    ):
        with pytest.raises((images.ImageError, FileNotFoundError, ValueError), match=message):
            load(clip, **{"num_frames": 2} | arguments)
    for module, name, most, used, refusal in (
        (images, "MAX_PIXELS", 48, [tmp_path / "a.gif", tmp_path / "frames"], "limit of 47"),
        (video, "MAX_ANIMATION_PIXELS", 576, [tmp_path / "a.webp"], "its 12 frames are 576 pixels, .* limit of 575"),
        (video, "MAX_FRAMES", 12, clips, "it has 12 frames; from 1 to 11 are expected"),
    ):
        for clip, limit in itertools.product(used, (most, most - 1)):
            monkeypatch.setattr(module, name, limit)
            with contextlib.nullcontext() if limit == most else pytest.raises(images.ImageError, match=refusal):
                assert len(load(clip, 2)) == 2
        monkeypatch.undo()


def test_films_without_av_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="a.mp4: .*pip install av"):
        load(tmp_path / "a.mp4", 2)


def film(path, number=12, size=(64, 48)):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for n in range(number):
            container.mux(stream.encode(av.VideoFrame.from_image(shade(n, size))))
        container.mux(stream.encode())


def test_films(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4")
    assert shades(load(tmp_path / "a.mp4", 12)) == list(range(12))
    assert shades(load(tmp_path / "a.mp4", 4)) == [1, 4, 7, 10]
    assert load(tmp_path / "a.mp4", 1)[0].size == (64, 48)
    assert len(load(tmp_path / "a.mp4", 20, "random")) == 20
    with pytest.raises(images.ImageError, match="frames of 64 x 48 pixels are more than the limit of 3,071"):
        monkeypatch.setattr(images, "MAX_PIXELS", 3071)
        load(tmp_path / "a.mp4", 4)
    monkeypatch.undo()
    (tmp_path / "bad.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:400])
    with pytest.raises(images.ImageError, match="bad.mp4: not a video, or damaged"):
        load(tmp_path / "bad.mp4", 4)
    monkeypatch.setattr(video, "_count", lambda *rest: 20)  # more packets than frames
    assert shades(load(tmp_path / "a.mp4", 4)) == [1, 4, 7, 10]
    monkeypatch.setattr(video, "MAX_FRAMES", 19)
    with pytest.raises(images.ImageError, match="a.mp4: it has 20 frames"):
        load(tmp_path / "a.mp4", 4)


# ---- in records ----


def source(folder, *items, **options):
    (folder / "some.json").write_text(json.dumps(list(items)))
    return LlavaJson(folder / "some.json", **options)


def test_a_video_is_one_visual_input_of_several_frames(tmp_path, clips):
    listed = [f"frames/frame{n}.png" for n in range(12)]
    for given in ("a.gif", "frames", listed):
        item = {"id": 1, "video": given, "conversations": asked("<video>\nWhat?")}
        record = source(tmp_path, item, num_frames=4).record(0)
        assert record.conversations[0][0].parts == (0, "\nWhat?")
        (visual,) = record.visuals
        assert len(visual.frames) == 4 and shades(visual.frames) == [1, 4, 7, 10]
        assert shades([visual.frames[0]]) == [1]
        expected = torch.cat([images.to_pixels(shade(n), 8)[None] for n in (1, 4, 7, 10)])
        assert torch.equal(pixels_of([visual], 8, "crop"), expected)
    item = {"id": 1, "image": ["frames/frame3.png", "frames/frame5.png"], "video": [["a.gif"], ["frames/frame7.png"]]}
    item["conversations"] = asked("<image> then <video>") + asked("<video> or <image>?", "<video>")
    record = source(tmp_path, item).record(0)
    parts = [turn.parts for turn in record.conversations[0]]
    assert parts == [(0, " then ", 1), ("a",), (2, " or ", 3, "?"), ("<video>",)]
    assert [len(visual.frames) for visual in record.visuals] == [1, 5, 5, 1]
    assert shades(map(images.load, record.visuals[3].frames)) == [5] and shades(record.visuals[2].frames) == [7] * 5
    source(tmp_path, {"id": 1, "video": "a.gif", "conversations": asked("<video>what?")})
    entry = {"reader": "llava", "path": "some.json", "num_frames": 3, "sampling": "random"}
    (tmp_path / "all.json").write_text(json.dumps({"films": entry}))
    (visual,) = listed_sources(tmp_path / "all.json", seed=2)[0]["films"].record(4).visuals
    assert visual.frames == video.Clip(str(tmp_path / "a.gif"), 3, "random", (2, 4))


def test_random_frames_are_drawn_anew_at_every_showing(tmp_path, clips):
    item = {"id": 1, "video": "frames", "conversations": asked("<video>what?")}

    def showings(seed):
        drawn = source(tmp_path, item, num_frames=4, sampling="random", seed=seed)
        return [(visual.key, tuple(shades(visual.frames))) for n in range(6) for visual in drawn.record(n).visuals]

    keys, frames = zip(*showings(0))
    assert len(set(keys)) == 6 and len(set(frames)) > 3, "in one batch they are several clips"
    assert showings(0) == showings(0) and frames != list(zip(*showings(1)))[1]
    assert source(tmp_path, item).record(0) == source(tmp_path, item).record(7)


def test_videos_that_are_wrong_or_missing(tmp_path, clips):
    with pytest.raises(ValueError, match=r"2 placeholder\(s\) <video> .* but 1 video\(s\)"):
        source(tmp_path, {"id": 1, "video": "a.gif", "conversations": asked("<video><video>")})
    for given in ([3], [["a.gif"], "b.gif", 4], 7):
        with pytest.raises(ValueError, match="field 'video' must be a path"):
            source(tmp_path, {"id": 1, "video": given, "conversations": asked("<video>")})
    given = ["x.gif", ["frames/frame1.png", "y.png"], "frames"]
    items = [{"id": 1, "video": video, "conversations": asked("<video>")} for video in given]
    with pytest.raises(FileNotFoundError, match="2 of 4 images are missing") as missing:
        source(tmp_path, *items)
    assert "x.gif" in str(missing.value) and "y.png" in str(missing.value)
    for none in ({}, {"video": []}, {"video": [[]]}, {"video": None}):
        plain = source(tmp_path, {"id": 1, **none, "conversations": asked("a <video> tag")}).record(0)
        assert plain.conversations[0][0].parts == ("a <video> tag",) and not plain.visuals
