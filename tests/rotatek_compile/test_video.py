"""Frames of clips: which are chosen, from folders and from files, and what is refused."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rotatek_compile.answer import model_inputs
from rotatek_compile.errors import RotateKError, UsageError
from rotatek_compile.video import Clip, chosen, read_clip


def frame(level, size=(16, 8)):
    return Image.new("RGB", size, (level, 0, 0))


@pytest.fixture
def folder(tmp_path):
    """Twelve frames whose names sort otherwise as text, and a file that is none."""
    for number in range(12):
        frame(number * 10).save(tmp_path / f"shot{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    return tmp_path


def test_evenly_spread():
    assert chosen(24, 6) == (0, 5, 9, 14, 18, 23)
    assert chosen(3, 8) == (0, 1, 2)
    assert chosen(10, 1) == (0,)


def test_a_folder_in_the_order_of_its_numbers(folder):
    clip = read_clip(folder, 4, fps=2.0)
    assert (clip.indices, clip.total, clip.fps) == ((0, 4, 7, 11), 12, 2.0)
    assert clip.frames.shape == (4, 8, 16, 3)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 40, 70, 110]


def test_a_processor_is_told_which_frames_they_are():
    clip = Clip(np.zeros((2, 4, 6, 3), np.uint8), (0, 9), 10, 2.0)
    told = clip.arguments()
    assert told["videos"][0] is clip.frames and told["do_sample_frames"] is False
    metadata = told["video_metadata"][0]
    assert (metadata.fps, metadata.total_num_frames, metadata.frames_indices, metadata.height, metadata.width) == (2.0, 10, [0, 9], 4, 6)
    assert metadata.duration == 5.0


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(24):
            picture = np.full((48, 64, 3), number * 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clip = read_clip(file, 6)
    assert (clip.indices, clip.total, clip.fps, clip.frames.shape) == ((0, 5, 9, 14, 18, 23), 24, 8.0, (6, 48, 64, 3))
    assert np.abs(clip.frames.mean((1, 2, 3)) - np.array(clip.indices) * 10).max() < 6
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(file.read_bytes()[:300])
    with pytest.raises(RotateKError, match=r"video .*broken.mp4 cannot be decoded"):
        read_clip(broken, 6)


def test_without_a_decoder(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RotateKError, match="needs the package av to be decoded: pip install av; or pass a folder of frames"):
        read_clip(tmp_path / "clip.mp4", 4)


def test_refusals(folder, tmp_path):
    with pytest.raises(RotateKError, match=r"nothing.mp4 does not exist"):
        read_clip(tmp_path / "nothing.mp4", 4)
    with pytest.raises(UsageError, match="--num-frames 0 is out of range"):
        read_clip(folder, 0)
    with pytest.raises(UsageError, match="--fps 0 is out of range"):
        read_clip(folder, 4, fps=0.0)
    with pytest.raises(UsageError, match="--fps 2 is for folders of frames"):
        read_clip(folder / "shot0.png", 4, fps=2.0)
    frame(0, (32, 8)).save(folder / "shot11.png")
    with pytest.raises(RotateKError, match="differ in size .16x8 and 32x8."):
        read_clip(folder, 4)
    (folder / "shot11.png").write_bytes(b"no picture")
    with pytest.raises(RotateKError, match=r"frame .*shot11.png cannot be read"):
        read_clip(folder, 4)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(RotateKError, match=r"empty holds no frames"):
        read_clip(empty, 4)


def test_a_model_that_takes_no_videos():
    clip = Clip(np.zeros((2, 4, 6, 3), np.uint8), (0, 1), 2, 1.0)
    with pytest.raises(RotateKError, match="SimpleNamespace takes no videos; pass frames as images"):
        model_inputs(SimpleNamespace(), [], "What?", clip)
