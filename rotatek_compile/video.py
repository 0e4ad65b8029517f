"""Frames of a clip: from a video file through PyAV, or from a folder of pictures."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .calibration_data.pictures import upright_rgb
from .errors import RotateKError, UsageError

FRAME_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
FOLDER_FPS = 1.0  # how fast the pictures of a folder follow one another unless it is said


@dataclass(frozen=True, slots=True)
class Clip:
    """Chosen frames uint8 [F, height, width, 3] RGB; `indices` [F] of them among `total` frames at `fps` frames a second."""

    frames: np.ndarray
    indices: tuple[int, ...]
    total: int
    fps: float

    def arguments(self) -> dict[str, Any]:
        """What a processor is called with, the prompt apart: the frames are chosen already, and it must not choose among them again."""
        from transformers.video_utils import VideoMetadata

        height, width = self.frames.shape[1:3]
        metadata = VideoMetadata(
            total_num_frames=self.total, fps=self.fps, duration=self.total / self.fps, frames_indices=list(self.indices),
            height=height, width=width,
        )  # fmt: skip
        return {"videos": [self.frames], "video_metadata": [metadata], "do_sample_frames": False}


def read_clip(path: Path, frames: int, fps: float | None = None) -> Clip:
    """Read at most `frames` frames of a clip, evenly spread from the first to the last.

    Args:
        path: a video file, or a folder of pictures that are its frames, in the order of the numbers in their names.
        fps: frames a second of a folder, by default 1; a file says it itself.

    Raises:
        UsageError: `fps` with a file, or fewer than one frame wanted.
        RotateKError: no such path, no frame in it, frames of different sizes, or nothing that can decode it.
    """
    if frames < 1:
        raise UsageError(f"--num-frames {frames} is out of range; it must be at least 1")
    if path.is_dir():
        return _from_folder(path, frames, FOLDER_FPS if fps is None else fps)
    if fps is not None:
        raise UsageError(f"--fps {fps:g} is for folders of frames, but {path} is no folder; a video file says it itself")
    if not path.exists():
        raise RotateKError(f"video {path} does not exist; check the path")
    return _from_file(path, frames)


def chosen(total: int, frames: int) -> tuple[int, ...]:
    """Indices of at most `frames` of `total` frames, evenly spread, first and last among them."""
    return tuple(sorted({round(place) for place in np.linspace(0, total - 1, min(frames, total))}))


def _from_folder(path: Path, frames: int, fps: float) -> Clip:
    from PIL import Image

    if not fps > 0:
        raise UsageError(f"--fps {fps:g} is out of range; it must be above 0")
    # img2 comes before img10
    files = sorted((f for f in path.iterdir() if f.suffix.lower() in FRAME_SUFFIXES), key=lambda f: [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", f.name)
    ])  # fmt: skip
    if not files:
        raise RotateKError(f"folder {path} holds no frames; name a video file, or a folder of {', '.join(FRAME_SUFFIXES)} pictures")
    indices, pictures = chosen(len(files), frames), []
    for index in indices:
        try:
            with Image.open(files[index]) as picture:
                pictures.append(np.asarray(upright_rgb(picture)))
        except (OSError, ValueError) as error:
            raise RotateKError(f"frame {files[index]} cannot be read: {error}; remove or replace it") from error
        if pictures[-1].shape != pictures[0].shape:
            sizes = " and ".join(f"{p.shape[1]}x{p.shape[0]}" for p in (pictures[0], pictures[-1]))
            raise RotateKError(f"the frames in {path} differ in size ({sizes}); make them one size")
    return Clip(np.stack(pictures), indices, len(files), fps)


def _from_file(path: Path, frames: int) -> Clip:
    if importlib.util.find_spec("av") is None:
        raise RotateKError(f"video {path} needs the package av to be decoded: pip install av; or pass a folder of frames")
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise RotateKError(f"{path} holds no video stream; pass a video file, or a folder of frames")
            rate = float(container.streams.video[0].average_rate or 0) or 24.0
            # containers may not know how many frames they have
            total = container.streams.video[0].frames or sum(packet.dts is not None for packet in container.demux(video=0))
        wanted = chosen(total, frames)
        found: dict[int, np.ndarray] = {}
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    found[index] = frame.to_ndarray(format="rgb24")
                if index >= wanted[-1]:
                    break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise RotateKError(f"video {path} cannot be decoded: {error}; check the file, or pass a folder of frames") from error
    if not found:
        raise RotateKError(f"video {path} holds no frame that can be decoded; check the file")
    return Clip(np.stack(list(found.values())), tuple(found), total, rate)
