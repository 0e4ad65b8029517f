"""The bundled sets: the same bytes everywhere, never the same document twice, every skill in turn."""

import hashlib

import pytest

from rotatek_compile.calibration_data import bundled
from rotatek_compile.calibration_data.draws import Draws

GOLDEN = {  # the first half of a SHA-256
    ("forms", "train", 0, 0): "1979feaa816c214b07399a130bd97542",
    ("forms", "evaluation", 3, 3): "e8fc9e30b21cb3b8abe963887b917e40",
    ("tables", "calibration", 0, 1): "3301025f967d6c9f1b46f4f3fc7c1ba8",
    ("tables", "evaluation", 0, 4): "418c049fef69714c9592a47b9efbe8e8",
    ("letters", "train", 0, 1): "f8836c44a678ffffb1d1336a81124217",
    ("letters", "evaluation", 2, 6): "55273a79542d8c45df30da620c9572b0",
    ("charts", "calibration", 0, 0): "2cb659664b3d797b9dc07029a5492b78",
    ("charts", "evaluation", 0, 5): "2aa8cac9f6d66f0288d1197a2144d635",
    ("mixed", "evaluation", 0, 0): "71b0865458ffbd34866a1829a21c63f0",
    ("mixed", "evaluation", 0, 1): "103d173bc98344a3a07b046005c9c9e8",
    ("mixed", "evaluation", 0, 2): "02049b47d7ee56b94d2dafb749c4bbee",
    ("mixed", "evaluation", 0, 3): "2c763cee4c2e26d2eae69e3f084df075",
    ("mixed", "evaluation", 0, 4): "3cf47caf1425104b0f98587e1cb4369f",
    ("mixed", "evaluation", 0, 5): "55d03a3c1e49c969df3b2c583f66da66",
    ("mixed", "evaluation", 0, 6): "3265b779a3885d68d0bbdc33ccd45ef3",
    ("mixed", "evaluation", 0, 7): "f9ec84f2a09eae4a2e80c05e82eaa91c",
    ("mixed", "evaluation", 0, 8): "a9a0dc5787bb7142379f41d40e9aee5c",
    ("mixed", "train", 1, 20): "745ade17c2f2b586c184296f07de09fd",
    ("mixed:page", "evaluation", 0, 2): "13b0acbdec04c8b54f5a25854b10325b",
    ("forms:missing", "calibration", 0, 7): "73d00387cc791e867467b2732f49e1ea",
}


def fingerprint(sample):
    digest = hashlib.sha256()
    for part in (sample.id, sample.skill, sample.question, *sample.answers):
        digest.update(part.encode())
    for image in sample.images:
        digest.update(image.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("name", "split", "seed", "index"), list(GOLDEN))
def test_samples_never_change(name, split, seed, index):
    bundled_name, _, skill = name.partition(":")
    sample = bundled.BundledSet(bundled_name, split, seed, skill or None).sample(index)
    assert sample.id == f"{name}/{split}/{seed}/{index}"
    assert fingerprint(sample)[:32] == GOLDEN[name, split, seed, index]


def test_order_of_access_does_not_matter():
    data = bundled.BundledSet("mixed", "calibration")
    late = fingerprint(data.sample(3))
    assert [fingerprint(sample) for sample in data.iterate(4)][3] == late


def test_sets_skills_splits_and_seeds_are_disjoint():
    # Compared is what is written: the id is left out, so that equal documents would be noticed.
    seen = []
    names = [(name, None) for name in bundled.SETS] + [("mixed", "field"), ("forms", "field")]
    for name, skill in names:
        for split in bundled.SPLITS:
            for seed in (0, 1):
                content, question = drawn(name, split, seed, index=0, skill=skill)
                seen.append((question.text, *(page.tobytes() for page in content.pages)))
    assert len(set(seen)) == len(seen) == len(names) * 6


def drawn(name, split, seed, index, skill=None):
    """The content behind a sample, by the public functions it is made of."""
    kinds, skills = bundled.SETS[name]
    title = f"{name}:{skill}" if skill else name
    return bundled.document_about(Draws(f"{title}/{split}/{seed}/{index}"), skill or skills[index % len(skills)], kinds)


@pytest.mark.parametrize("name", list(bundled.SETS))
def test_every_skill_in_turn_on_one_to_three_pages(name):
    skills = bundled.SETS[name][1]
    samples = list(bundled.BundledSet(name, "train").iterate(max(18, 2 * len(skills))))
    assert [sample.skill for sample in samples] == [skills[index % len(skills)] for index in range(len(samples))]
    assert {len(sample.images) for sample in samples} == {1, 2, 3}
    assert all(image.size == (320, 320) and image.mode == "RGB" for sample in samples for image in sample.images)
    assert all(sample.question and len(sample.answers) == 1 and sample.answers[0].strip() == sample.answers[0] for sample in samples)
    for index in (0, 1):
        content, question = drawn(name, "train", 0, index)
        assert (samples[index].question, samples[index].answers) == (question.text, (question.answer,))
        assert len(samples[index].images) == len(content.pages)


@pytest.mark.parametrize("name", list(bundled.SETS))
def test_one_skill_alone(name):
    for skill in bundled.SETS[name][1]:
        sample = bundled.BundledSet(name, "evaluation", skill=skill).sample(0)
        assert (sample.skill, sample.id) == (skill, f"{name}:{skill}/evaluation/0/0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("nope", "train"), "'nope'"), (("forms", "test"), "'test'"), (("forms", "train", 0, "chart"), "'chart' is none of them")],
)
def test_what_is_not_there_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        bundled.BundledSet(*arguments)


@pytest.mark.parametrize("subject", list(bundled.WRITERS))
def test_fullness_gives_emptier_pages(subject):
    def rows(fullness):
        contents = [bundled.compose(Draws(f"fullness/{number}"), 2, (subject,), subject, fullness=fullness) for number in range(40)]
        return [int((page > 0).any(1).sum()) for content in contents for page in content.pages]

    full, emptier = rows(100), rows(25)
    extra = {"fields": 0, "table": 1, "letter": 0, "chart": 1}[subject]  # header, axis
    assert min(emptier) == 2 + extra and max(emptier) <= 4 + extra
    assert min(full) >= 4 + extra and max(full) >= 13 + extra


@pytest.mark.parametrize("subject", list(bundled.WRITERS))
def test_the_subject_is_there_and_alike_pages_are_of_one_kind(subject):
    kinds = tuple(bundled.WRITERS)
    several = [bundled.compose(Draws(f"subject/{number}"), 3, kinds, subject).kinds for number in range(20)]
    assert all(subject in found and len(found) == 3 for found in several)
    assert {place for found in several for place in range(3) if found[place] == subject} == {0, 1, 2}
    assert bundled.compose(Draws("alike"), 3, kinds, subject, alike=True).kinds == [subject] * 3
