"""Reading a call's token kinds: runs of text and of one image or clip each per row, padding left out."""

import warnings

import numpy as np
import pytest
import torch

from rotatek_compile.runtime import segments
from rotatek_compile.runtime.segments import PAD, TEXT, Run, Step, columns, plain_step, read_kinds, runs_of

IMAGE, VIDEO = 5, 6  # placeholder ids


def read(ids, mask=None, types=None):
    ids = torch.tensor(ids)
    mask = None if mask is None else torch.tensor(mask)
    kinds = read_kinds(ids, mask, None if types is None else torch.tensor(types), (IMAGE, VIDEO), tuple(ids.shape), VIDEO)
    if kinds is None:
        return plain_step(*ids.shape)
    return Step(*ids.shape, tuple(runs_of(row) for row in kinds))


def image(start, end, medium):
    return Run(start, end, segments.IMAGE, medium)


def video(start, end, medium):
    return Run(start, end, segments.VIDEO, medium)


def columns_of(step, row=0):
    """Columns of the text, and of each image or clip, as `columns` takes them out."""
    numbered = torch.arange(step.length).expand(2, 1, -1).transpose(1, 2)
    return [columns(numbered, runs)[1, :, 0].tolist() for runs in (step.text(row), *step.media(row))]


def test_runs_of_images_and_text():
    step = read([[9, 5, 5, 8, 5, 7, 7]])
    assert step.rows == ((Run(0, 1, TEXT), image(1, 3, 1), Run(3, 4, TEXT), image(4, 5, 3), Run(5, 7, TEXT)),)
    assert not step.plain_text
    assert columns_of(step) == [[0, 3, 5, 6], [1, 2], [4]]
    assert step.text_tail() == 2
    assert (step.batch, step.length, step.tokens(0)) == (1, 7, 7)


def test_padding_belongs_to_no_run_and_pad_tokens_may_look_like_images():
    step = read([[5, 5, 9, 5], [9, 9, 9, 9]], [[0, 0, 1, 1], [1, 1, 1, 0]])
    assert step.rows == ((Run(2, 3, TEXT), image(3, 4, 2)), (Run(0, 3, TEXT),))
    assert step.text_tail() == 0
    assert not step.plain_text
    assert [step.tokens(row) for row in range(2)] == [2, 3]


def test_only_the_newest_columns_of_the_mask_count():
    assert read([[9, 9]], [[0, 0, 0, 1, 1]]) == plain_step(1, 2)
    assert read([[9, 9]], [[1, 1, 1, 0, 1]]).rows == ((Run(1, 2, TEXT),),)


def test_a_row_of_padding_only():
    step = read([[9, 9], [9, 9]], [[0, 0], [1, 1]])
    assert step.rows == ((), (Run(0, 2, TEXT),))
    assert columns_of(step) == [[]]
    assert not step.plain_text


def test_video_tokens_are_not_image_tokens():
    assert read([[6, 6, 9]]).rows[0][0] == video(0, 2, 0)
    assert read([[6, 5, 5]]).rows[0] == (video(0, 1, 0), image(1, 3, 1))


def test_token_types_win():
    assert read([[5, 9, 9, 9]], types=[[0, 1, 2, 3]]).rows == ((Run(0, 1, TEXT), image(1, 2, 1), video(2, 3, 2), Run(3, 4, TEXT)),)
    # of another shape (those of the whole prompt, in a later call) they say nothing
    assert read([[5, 9]], types=[[0, 0, 0]]).rows == ((image(0, 1, 0), Run(1, 2, TEXT)),)
    # unless they reach as far as the mask: the types of a prompt that arrives in chunks
    assert read([[9, 9]], [[1, 1, 1]], types=[[0, 0, 1]]).rows == ((Run(0, 1, TEXT), image(1, 2, 1)),)


def test_one_generated_token_is_text_whatever_its_id():
    assert read([[5], [9]]) == plain_step(2, 1)
    assert read([[5], [9]], [[0, 1], [1, 1]]) == plain_step(2, 1)
    assert read([[5], [9]], [[1, 0], [1, 1]]).rows == ((), (Run(0, 1, TEXT),))


def test_embeddings_warn_and_count_as_text():
    with pytest.warns(UserWarning, match="inputs_embeds came without input_ids"):
        assert read_kinds(None, None, None, (IMAGE,), (2, 3)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = read_kinds(None, None, torch.tensor([[1, 1, 0]]), (IMAGE,), (1, 3))
    assert kinds.tolist() == [[1, 1, 0]]


def test_other_masks_say_nothing():
    four = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert read_kinds(torch.tensor([[9, 9]]), four, None, (IMAGE,), (1, 2)) is None


def test_runs_of_edges():
    assert runs_of(np.zeros(0, np.int8)) == ()
    assert runs_of(np.array([PAD, PAD])) == ()
    assert runs_of(np.array([1])) == (image(0, 1, 0),)
    assert Step(1, 3, ((Run(1, 3, TEXT),),)).text_tail() == 2
    assert Run(2, 7, TEXT).length == 5


def test_media_split_runs_and_join_them():
    kinds, media = np.array([1, 1, 1, 0, 2, 0, 2]), np.array([0, 0, 1, -1, 2, -1, 2])
    step = Step(1, 7, (runs_of(kinds, media),))
    assert step.rows[0] == (image(0, 2, 0), image(2, 3, 1), Run(3, 4, TEXT), video(4, 5, 2), Run(5, 6, TEXT), video(6, 7, 2))
    assert columns_of(step) == [[3, 5], [0, 1], [2], [4, 6]]
