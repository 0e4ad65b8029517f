"""Tokenizers of text-only models with the calls of a processor, and processors without their video part."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rotatek_compile import RotateKError
from rotatek_compile.batches import prompt_text, tokenized
from rotatek_compile.processors import PARTS, TextProcessor, without_videos

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def processor():
    vocabulary = {chr(n): n for n in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="\x00"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="\x01", padding_side="left")
    made.chat_template = TEMPLATE
    return TextProcessor(made)


def test_messages_in_parts_become_text(processor):
    assert prompt_text(processor, 0, "Hi?") == "[user]Hi?[assistant]"
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ]
    assert processor.apply_chat_template(talk, tokenize=False) == "[user]ab[assistant]c"
    assert talk[0]["content"][0] == {"type": "text", "text": "a"}  # the caller's messages are left alone


def test_without_a_template_the_question_stands_as_it_is(processor):
    processor.tokenizer.chat_template = None
    assert prompt_text(processor, 0, "Once upon a time") == "Once upon a time"
    with pytest.raises(ValueError, match="chat_template"):  # the tokenizer's own words where a template is asked for
        processor.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)


@pytest.mark.parametrize("medium", ["image", "video"])
def test_nothing_but_text_is_read(processor, medium):
    with pytest.raises(RotateKError, match=f"this is a text-only model: it reads no {medium}; leave it out"):
        prompt_text(processor, int(medium == "image"), "Hi?", videos=int(medium == "video"))
    with pytest.raises(RotateKError, match="this is a text-only model: it reads no images and no videos; leave them out"):
        processor(text=["Hi?"], **{f"{medium}s": ["page"]}, return_tensors="pt")


def test_everything_else_is_the_tokenizers(processor, tmp_path):
    inputs = tokenized(processor, "ab", ())
    assert inputs["input_ids"].tolist() == [[97, 98]]
    assert processor.chat_template == TEMPLATE and processor.decode([97]) == processor.tokenizer.decode([97])
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE and (tmp_path / "tokenizer.json").is_file()
    with pytest.raises(AttributeError):
        processor.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError):
        TextProcessor.__new__(TextProcessor).tokenizer  # noqa: B018 - as pickle asks, before there is one


def test_the_video_part_is_only_settings():
    from transformers import Gemma3Processor, SmolVLMProcessor

    made = without_videos(SmolVLMProcessor)
    assert made.__name__ == "SmolVLMProcessor" and made.get_attributes() == PARTS[:2]
    bare = made.__new__(made)
    assert (bare.video_processor.num_frames, bare.video_processor.fps) == (None, None)  # looked up for every prompt
    bare.video_section = {"num_frames": 8, "size": {"longest_edge": 64}}
    assert bare.video_processor.num_frames == 8
    with pytest.raises(RotateKError, match="Gemma3Processor has the parts image_processor, tokenizer"):
        without_videos(Gemma3Processor)
