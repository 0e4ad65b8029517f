"""Documents of a data set as a sequence of encoded prompts, made when they are asked for: pages are never all in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from .batches import Encoded, RopeIndex, encode
from .calibration_data.errors import EndOfData
from .calibration_data.registry import DataSource
from .calibration_data.sample import Sample
from .errors import RotateKError, UsageError
from .geometry import Geometry


def usable(data: DataSource, count: int, text_only: bool = False) -> dict[int, str]:
    """Places and ids of the samples with an image and an answer, among the first `count`; every one is opened once.

    For a text-only model those with an answer and no image.

    Raises:
        RotateKError: there is none.
        DataError: an image or row that cannot be read.
    """
    samples = enumerate(data.samples(count))
    found = {place: sample.id for place, sample in samples if bool(sample.images) != text_only and sample.answers}
    if not found and text_only:
        raise RotateKError(f"{data.name} has no usable sample: a text-only model reads questions with an answer and without images")
    if not found:
        raise RotateKError(f"{data.name} has no usable sample: each needs at least one image and one answer")
    return found


def document(data: DataSource, number: int) -> Sample:
    """One sample, by its place from 0.

    Raises:
        UsageError: there are fewer.
        DataError: an image or row that cannot be read.
    """
    try:
        if data.size is None or number < data.size:
            return data.sample(number)
    except EndOfData:
        pass
    held = f"{data.size} documents" if data.size is not None else "fewer documents"
    raise UsageError(f"--sample {number} is out of range: {data.name} has {held}, and the first is 0")


class Documents(Sequence[Encoded]):
    """Samples at these places of a data set, encoded anew at each access; slicing gives a view.

    `rope` is `rope_index(model)`, which models with several position axes need.
    """

    def __init__(
        self, data: DataSource, places: Iterable[int], processor: Any, geometry: Geometry, eos: int, rope: RopeIndex | None = None
    ) -> None:
        self.data, self.processor, self.geometry, self.eos, self.rope = data, processor, geometry, eos, rope
        self.places = list(places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Encoded | Documents:
        if isinstance(index, slice):
            return Documents(self.data, self.places[index], self.processor, self.geometry, self.eos, self.rope)
        return encode(self.processor, self.data.sample(self.places[index]), self.geometry, self.eos, self.rope)
