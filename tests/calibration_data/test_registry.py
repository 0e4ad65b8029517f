"""Names of data sets."""

from itertools import islice

import pytest

from rotatek_compile.calibration_data.bundled import SETS
from rotatek_compile.calibration_data.errors import DataError
from rotatek_compile.calibration_data.registry import DATASETS, DataSource, open_data


def test_forms_by_name():
    source = open_data("forms", "calibration", seed=3)
    assert (source.name, source.split, source.revision) == ("forms", "calibration", None)
    ids = [sample.id for sample in source.samples(3)]
    assert ids == ["forms/calibration/3/0", "forms/calibration/3/1", "forms/calibration/3/2"]
    assert next(iter(open_data("forms", "evaluation", 3).samples(1))).id == "forms/evaluation/3/0"


def test_one_skill_of_a_set_by_name():
    source = open_data("forms:missing", "evaluation", seed=1)
    assert (source.name, source.size) == ("forms:missing", None)
    samples = list(source.samples(3))
    assert [sample.skill for sample in samples] == ["missing"] * 3
    assert [sample.id for sample in samples] == [f"forms:missing/evaluation/1/{number}" for number in range(3)]
    assert list(DATASETS) == list(SETS)


@pytest.mark.parametrize("name", list(DATASETS))
@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_every_bundled_set_gives_usable_samples(name, split):
    for sample in islice(open_data(name, split).samples(2), 2):
        assert sample.images and sample.answers and sample.question.strip()


def test_local_path(data_file):
    source = open_data(str(data_file), "evaluation")
    assert (source.name, source.split) == (str(data_file), "local") and len(source.revision) == 16
    assert len(list(source.samples(2))) == 2 and len(list(source.samples(99))) == 4


def test_hash_depends_on_ids_and_order():
    assert DataSource.hash_ids(["a", "b"]) == DataSource.hash_ids(("a", "b"))
    assert len({DataSource.hash_ids(ids) for ids in (["a", "b"], ["b", "a"], ["a"], ["ab"], [])}) == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nope", "unknown data set 'nope'; use one of forms, tables, letters, charts, mixed, docvqa,"),
        ("nope:field", "unknown data set 'nope:field'"),
        ("forms:nope", "unknown skill in 'forms:nope'; forms has forms:field, forms:missing, forms:larger, forms:page"),
        ("forms:", "unknown skill in 'forms:'"),
        ("", "unknown data set ''"),
        ("no.jsonl", "data path no.jsonl does not exist"),
        ("~/no-such-folder", "data path ~/no-such-folder does not exist"),
        ("no/such", "no/such is not in the local cache; fetch it with `hf download --repo-type dataset no/such`, or pass a local path"),
        ("no/such/folder", "data path no/such/folder does not exist"),
        ("no/such.parquet", "data path no/such.parquet does not exist"),
    ],
)
def test_names_that_mean_nothing(name, words):
    with pytest.raises(DataError) as error:
        open_data(name, "calibration")
    assert words in str(error.value)
