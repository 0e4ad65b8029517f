"""Processors as this package calls them: those that also take videos without torchvision, and tokenizers of text-only models.

transformers reads images with Pillow alone, but its video processors need torchvision, and a processor with a video part does not load
without it. Here the same processor class is built without that part: the library's own code still expands the image placeholders.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.import_utils import is_torchvision_available

from .errors import RotateKError

PARTS = ["image_processor", "tokenizer", "video_processor"]  # in this order in the constructor of every class that can do without the last


class _WithoutVideos:
    """Mixed in before a stock processor class: the same processor, whose video part is only a section of its configuration."""

    video_section: dict[str, Any] | None = None

    @property
    def video_processor(self) -> Any:
        """The settings of the missing part: SmolVLM's chat template looks up two of them even where there is no video."""
        return SimpleNamespace(**{"num_frames": None, "fps": None} | (self.video_section or {}))

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The library loads, checks and saves exactly the parts named here.
        return PARTS[:2]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        settings = dict(processor_dict)
        section, settings["video_processor"] = settings.get("video_processor"), None  # SmolVLM's constructor demands one
        loaded: Any = super().from_args_and_dict(args, settings, **kwargs)  # type: ignore[misc]
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor.video_section = section
        return loaded

    def prepare_inputs_layout(self, *args: Any, videos: Any = None, **kwargs: Any) -> Any:
        if videos is not None:
            raise RotateKError("videos need torchvision, which is not installed here; install it, or pass the frames as images")
        return super().prepare_inputs_layout(*args, videos=videos, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        # Written back as it was read, so that AutoProcessor finds a complete processor where torchvision exists.
        section = {} if self.video_section is None else {"video_processor": self.video_section}
        return {**super().to_dict(), **section}  # type: ignore[misc]


def without_videos(stock: type[ProcessorMixin]) -> type[Any]:
    """The processor class `stock` without its video part: `cls(image_processor=..., tokenizer=..., chat_template=...)`.

    Some classes want `video_processor=None` said. It carries the name of `stock`, because saved files name their class. `video_section`
    of an instance (a dict or None) is written to `processor_config.json` as its section `video_processor`. Videos raise RotateKError.

    Raises:
        RotateKError: the class has other parts than image processor, tokenizer and video processor.
    """
    if (found := stock.get_attributes()) != PARTS:
        raise RotateKError(f"{stock.__name__} has the parts {', '.join(found)}, which need torchvision here; install torchvision")
    return type(stock.__name__, (_WithoutVideos, stock), {"__doc__": stock.__doc__, "__module__": __name__})


def load_without_videos(location: str | Path, **arguments: Any) -> Any:
    """The processor at `location` (a directory or a Hub id) for images and text, or None if it does not want for torchvision.

    That is: torchvision is installed, or the files name no processor class of transformers, or one with other parts. `arguments` are those
    of `from_pretrained`.

    Raises:
        Exception: whatever transformers raises for damaged files.
    """
    stock = None if is_torchvision_available() else _stock_class(location, **arguments)
    if stock is None or stock.get_attributes() != PARTS:
        return None
    return without_videos(stock).from_pretrained(location, **arguments)


def _stock_class(location: str | Path, **arguments: Any) -> type[ProcessorMixin] | None:
    """The class that processor_config.json names, else preprocessor_config.json, or None."""
    import transformers

    name = None
    for read in (ProcessorMixin.get_processor_dict, ImageProcessingMixin.get_image_processor_dict):
        try:
            name = read(location, **arguments)[0].get("processor_class")
        except (OSError, ValueError):
            continue  # no such file
        if name:
            break
    stock = getattr(transformers, name, None) if isinstance(name, str) else None
    return stock if isinstance(stock, type) and issubclass(stock, ProcessorMixin) else None


class TextProcessor:
    """The tokenizer of a text-only model with the calls that processors of vision models have; everything else is the tokenizer's.

    Messages are as for a processor: their content is text, or a list of parts of which all are text. A model without a chat template
    (a base model) is given the text of its messages as it stands.
    """

    image_processor = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # asked for before __init__ when unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """As the tokenizer's call.

        Raises:
            RotateKError: images or videos were passed.
        """
        if images or videos:
            raise RotateKError("this is a text-only model: it reads no images and no videos; leave them out")
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """As the tokenizer's, with content in parts allowed.

        Raises:
            RotateKError: a part that is no text.
        """
        messages = [{**message, "content": _text_of(message["content"])} for message in conversation]
        if self.tokenizer.chat_template is None and not kwargs.get("tokenize", True):
            return "".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(messages, **kwargs)


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if other := sorted({str(part.get("type")) for part in content} - {"text"}):
        raise RotateKError(f"this is a text-only model: it reads no {' and no '.join(other)}; leave it out")
    return "".join(part["text"] for part in content)
