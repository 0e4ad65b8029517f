"""The vocabulary of bundled documents: words for labels, and kinds of values."""

from __future__ import annotations

import string

from .draws import Draws

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
            "$n.dd", "$nd.dd", "$ndd.dd", "n,ddd.dd", "nd%", "n.d%",  # amounts
            "M/D/dd", "D B dd", "20dd-M", "H:T",  # dates and times
            "UU-dddd", "UdddU", "dddd-UU", "#ddddd", "UUU dd", "dd.dd.U",  # codes
            "F L", "U. L", "Cvcvcv", "Cvcvcvcv", "F Cvcv",  # names
        ),
    )
)  # fmt: skip


def draw_value(draws: Draws) -> str:
    """A value of a random kind: an amount, a date, a code or a name; at most 9 characters."""
    return "".join(draws.one_of(slot) for slot in draws.one_of(VALUE_KINDS))
