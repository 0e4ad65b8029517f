"""What is written on `forms` pages: the keys, the kinds of values, and the ranges every random choice is drawn from.

Kept apart from the drawing so that the trainer of the bundled checkpoint can compose the same documents on a GPU.
"""

from __future__ import annotations

import string

CELLS = 20  # characters per row, rows per page
MAX_PAGES = 3
ROWS = (6, 18)  # fields on one page, both ends included
MAX_KEY = 9
MAX_VALUE = 9  # MAX_KEY + len(": ") + MAX_VALUE fits a row exactly
PAPER = (200, 255)  # grey of the lighter colour of a page
INK = (0, 90)  # grey of the darker one
SHIFT = 2  # the print of a page is displaced by up to this many pixels in both directions
NOISE = 8  # largest amplitude of the uniform noise, in grey levels
INVERTED_ONE_IN = 8  # one page in so many is light on dark

_WORDS = """
    account address agent agenda amount annex area asset audit author bank batch bay bill bin block board bonus book box branch budget
    buyer case cash cell charge check city claim class clerk client code copy cost county credit dealer debit delay dept deposit desk
    district dock door draft driver due duty email entry event expiry fax fee file firm fleet floor form freight fund gate grade grant
    gross group guest hall hours hub id index insurer invoice issue item job journal key label lease ledger length level limit line loan
    lot mail manager margin meter mode model month name net notary number office order origin owner page parcel parts pay payee payer
    permit phase phone plan plant plate policy port price proof quota quote rank rate rebate receipt ref region renewal rent report
    review risk role room route sales seal sector seller serial series shelf shift site size sponsor staff state status stock store
    street tank tariff tax team tenant term ticket time title total town tower track trip truck type unit vendor visa volume voucher
    wage ward weight width witness yard year zip zone
"""
WORDS = tuple(_WORDS.split())
SINGLE_KEYS = tuple(word for word in WORDS if len(word) <= MAX_KEY)
PAIR_KEYS = tuple(f"{first} {second}" for first in WORDS for second in WORDS if first != second and len(first) + len(second) < MAX_KEY)
KEYS = SINGLE_KEYS + PAIR_KEYS
# Relative odds of a key being drawn: both sorts together weigh about the same, though there are many more pairs than words.
SINGLE_WEIGHT = round(len(PAIR_KEYS) / len(SINGLE_KEYS))

# A kind of value is a sequence of slots; each slot is a choice among strings of one length, so that a kind has one length too.
Slot = tuple[str, ...]
_DIGIT: Slot = tuple(string.digits)
_LEADING: Slot = tuple("123456789")
_UPPER: Slot = tuple(string.ascii_uppercase)
_CONSONANT: Slot = tuple("bcdfghjklmnprstvwz")
_CAPITAL: Slot = tuple("BCDFGHJKLMNPRSTVWZ")
_VOWEL: Slot = tuple("aeiou")
_DAY: Slot = tuple(f"{day:02d}" for day in range(1, 29))
_MONTH: Slot = tuple(f"{month:02d}" for month in range(1, 13))
_MONTH_NAME: Slot = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_HOUR: Slot = tuple(f"{hour:02d}" for hour in range(24))
_MINUTE: Slot = tuple(f"{minute:02d}" for minute in range(60))
_FIRST: Slot = ("Ann", "Ben", "Eva", "Ida", "Ira", "Jan", "Kim", "Leo", "Mia", "Max", "Ned", "Pia", "Ray", "Sue", "Tom", "Zoe")
_LAST: Slot = (
    "Adler", "Brown", "Chang", "Davis", "Ellis", "Frank", "Gupta", "Hayes", "Irwin", "Jones", "Klein", "Lopez", "Meyer",
    "Novak", "Olsen", "Patel", "Quinn", "Rossi", "Smith", "Tanak", "Unger", "Vidal", "Weber", "Young", "Zhang",
)  # fmt: skip


def _slots(pattern: str) -> tuple[Slot, ...]:
    """Slots of a pattern in which letters stand for classes and everything else for itself."""
    classes = {
        "d": _DIGIT, "n": _LEADING, "U": _UPPER, "c": _CONSONANT, "C": _CAPITAL, "v": _VOWEL, "D": _DAY, "M": _MONTH,
        "B": _MONTH_NAME, "H": _HOUR, "T": _MINUTE, "F": _FIRST, "L": _LAST,
    }  # fmt: skip
    return tuple(classes.get(letter, (letter,)) for letter in pattern)


VALUE_KINDS: tuple[tuple[Slot, ...], ...] = tuple(
    map(
        _slots,
        (
            "ndd", "nddd", "ndddd", "nddddd",  # numbers
            "$n.dd", "$nd.dd", "$ndd.dd", "n,ddd.dd", "nd%", "n.d%",  # amounts
            "M/D/dd", "D B dd", "20dd-M", "H:T",  # dates and times
            "UU-dddd", "UdddU", "dddd-UU", "#ddddd", "UUU dd", "dd.dd.U",  # codes
            "F L", "U. L", "Cvcvcv", "Cvcvcvcv", "F Cvcv",  # names
        ),
    )
)  # fmt: skip


def question_about(key: str) -> str:
    """The question whose answer is the value behind `key`."""
    return f"What is the {key}?"
