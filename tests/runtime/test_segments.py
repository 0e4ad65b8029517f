"""Reading a call's token kinds: runs of text and images per row, padding left out."""

import warnings

import numpy as np
import pytest
import torch

from rotatek_compile.runtime.segments import PAD, TEXT, VISUAL, Run, Step, plain_step, read_step, runs_of

IMAGE, VIDEO = 5, 6


def read(ids, mask=None, types=None):
    ids = torch.tensor(ids)
    mask = None if mask is None else torch.tensor(mask)
    return read_step(ids, mask, None if types is None else torch.tensor(types), (IMAGE, VIDEO), tuple(ids.shape))


def test_runs_of_images_and_text():
    step = read([[9, 5, 5, 8, 5, 7, 7]])
    assert step.rows == ((Run(0, 1, TEXT), Run(1, 3, VISUAL), Run(3, 4, TEXT), Run(4, 5, VISUAL), Run(5, 7, TEXT)),)
    assert not step.plain_text
    assert step.text_columns(0).tolist() == [0, 3, 5, 6]
    assert step.text_tail() == 2
    assert (step.batch, step.length) == (1, 7)


def test_padding_belongs_to_no_run_and_pad_tokens_may_look_like_images():
    step = read([[5, 5, 9, 5], [9, 9, 9, 9]], [[0, 0, 1, 1], [1, 1, 1, 0]])
    assert step.rows == ((Run(2, 3, TEXT), Run(3, 4, VISUAL)), (Run(0, 3, TEXT),))
    assert step.text_tail() == 0
    assert not step.plain_text


def test_only_the_newest_columns_of_the_mask_count():
    assert read([[9, 9]], [[0, 0, 0, 1, 1]]) == plain_step(1, 2)
    assert read([[9, 9]], [[1, 1, 1, 0, 1]]).rows == ((Run(1, 2, TEXT),),)


def test_a_row_of_padding_only():
    step = read([[9, 9], [9, 9]], [[0, 0], [1, 1]])
    assert step.rows == ((), (Run(0, 2, TEXT),))
    assert step.text_columns(0).tolist() == []
    assert not step.plain_text


def test_video_tokens_are_visual():
    assert read([[6, 6, 9]]).rows[0][0] == Run(0, 2, VISUAL)


def test_token_types_win():
    assert read([[5, 9, 9, 9]], types=[[0, 1, 2, 3]]).rows == ((Run(0, 1, TEXT), Run(1, 3, VISUAL), Run(3, 4, TEXT)),)
    # of another shape (those of the whole prompt, in a later call) they say nothing
    assert read([[5, 9]], types=[[0, 0, 0]]).rows == ((Run(0, 1, VISUAL), Run(1, 2, TEXT)),)


def test_one_generated_token_is_text_whatever_its_id():
    assert read([[5], [9]]) == plain_step(2, 1)
    assert read([[5], [9]], [[0, 1], [1, 1]]) == plain_step(2, 1)
    assert read([[5], [9]], [[1, 0], [1, 1]]).rows == ((), (Run(0, 1, TEXT),))


def test_embeddings_warn_and_count_as_text():
    with pytest.warns(UserWarning, match="inputs_embeds came without input_ids"):
        step = read_step(None, None, None, (IMAGE,), (2, 3))
    assert step == plain_step(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = read_step(None, None, torch.tensor([[1, 1, 0]]), (IMAGE,), (1, 3))
    assert step.rows == ((Run(0, 2, VISUAL), Run(2, 3, TEXT)),)


def test_other_masks_say_nothing():
    four = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert read_step(torch.tensor([[9, 9]]), four, None, (IMAGE,), (1, 2)) == plain_step(1, 2)


def test_runs_of_edges():
    assert runs_of(np.zeros(0, np.int8)) == ()
    assert runs_of(np.array([PAD, PAD])) == ()
    assert runs_of(np.array([VISUAL])) == (Run(0, 1, VISUAL),)
    assert Step(1, 3, ((Run(1, 3, TEXT),),)).text_tail() == 2
    assert Run(2, 7, TEXT).length == 5
