"""How the VQA challenge makes answers comparable (Antol et al. 2015, evaluation code; used by EvalAI and lmms-eval for TextVQA).

Lower case, punctuation out, number words to digits, articles out, apostrophes back into contractions.
"""

from __future__ import annotations

import re

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Each word without any one of its apostrophes, to the word. The challenge maps one the other way round."""
    table = {}
    for word in CONTRACTED.split():
        for place in (n for n, char in enumerate(word) if char == "'"):
            table[word[:place] + word[place + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def vqa_normalise(text: str) -> str:
    """The answer as it is compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        # between letters it parts words, beside a blank it is only dropped
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", cleaned).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
