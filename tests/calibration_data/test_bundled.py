"""The bundled sets: the same bytes everywhere, never the same document twice, every skill in turn."""

import hashlib

import pytest

from rotatek_compile.calibration_data import bundled
from rotatek_compile.calibration_data.draws import Draws

GOLDEN = {  # the first half of a SHA-256
    ("forms", "train", 0, 0): "2ffc2342eff3025893e7c71f256f2cf0",
    ("forms", "evaluation", 3, 3): "2b35ca41c37fca2f01267d9e4bdd8e06",
    ("tables", "calibration", 0, 1): "c03094bd96111c85f169a61c49f47075",
    ("tables", "evaluation", 0, 4): "58207e772983b6233bebc05c814f23fc",
    ("letters", "train", 0, 1): "43c13dc4fcc5aa2f4fa47eb1682fb3f9",
    ("letters", "evaluation", 2, 6): "8cd32cbaf43909daa84497732b608bf5",
    ("charts", "calibration", 0, 0): "9eb00bb39ff97da0d0bfac436360b9d7",
    ("charts", "evaluation", 0, 5): "f112f8842d377e7741534020a1ea2876",
    ("mixed", "evaluation", 0, 0): "092a08496e0a2edcf8ce2d1780815497",
    ("mixed", "evaluation", 0, 1): "66befc5480d746c0550a75551083c2a7",
    ("mixed", "evaluation", 0, 2): "a7276199d98cbbe24c0c0f929e2b4586",
    ("mixed", "evaluation", 0, 3): "7420622b393cc036721f5186c6711b07",
    ("mixed", "evaluation", 0, 4): "c63967c2c55b8a4a17fe7770579d1b75",
    ("mixed", "evaluation", 0, 5): "01c5899b57031de63b229db62154b225",
    ("mixed", "evaluation", 0, 6): "70a5254f081efe5d5d4ccd9187b5b57b",
    ("mixed", "evaluation", 0, 7): "bac25ba5caf61a0b75d815865f690c54",
    ("mixed", "evaluation", 0, 8): "bf706ae9e6783f40570a23a51991ed86",
    ("mixed", "train", 1, 20): "286c0d01f235921eccd468fcac39b271",
    ("mixed:page", "evaluation", 0, 2): "72109fece070eb1d9d874877e737c254",
    ("forms:missing", "calibration", 0, 7): "5583027a78e62b07fbebd49ee0fbd6d1",
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
