"""Languages: identification with the model inside `py3langid`, and what the filters need to know about each language.

Notable features:
- identification looks at a slice from the middle of a text: beginnings are titles and licenses, and the cost stays 1 ms
- a label is rejected only when the identifier is sure in most of several slices: a translated manual with an English paragraph or
  a listing in its middle is not an English manual
- only labels that the identifier knows can be rejected: it distinguishes 97 languages, and close relatives (Croatian and Serbian,
  Indonesian and Malay) count as one
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

SAMPLE_CHARS = 600
SLICES = 5
SURE = 0.95

_RELATIVES = tuple(
    frozenset(group.split())
    for group in (
        "hr bs sr sl", "id ms jv zlm min", "nb no nn da sv", "cs sk", "pt gl es oc ca an", "zh zh_CN zh_TW",
        "ru uk be bg mk ky mn kk", "fa ur ar ps ug ku", "hi mr ne", "af nl lb de", "az tr tk uz", "xh zu rw",
        "it rm fur co la eo", "bn as", "fr wa frp",
    )
)  # fmt: skip

# Gopher's stop-word test for other languages than English: very frequent function words, and words of
# instructions, because manuals in languages without articles (Finnish, Turkish) have few of the former.
STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the be to of and that have with in is a for it",
        "de": "der die das und ist nicht ein zu in mit den von sie auf im oder wenn wird für",
        "fr": "le la les de et est un une que pas dans pour des en sur ou par du au",
        "es": "el la los de y que en un una no con por para se del o al si es",
        "it": "il la di e che un una non per in del con sono le è o si da dei",
        "pt": "o a os de e que um uma não para com em do da ou se no na por",
        "nl": "de het een en van is niet dat in op te zijn met of u voor om wordt",
        "pl": "i w nie na się z do to że jest o jak za lub dla oraz aby jeśli po tego",
        "cs": "a v se na je to že s z do o i ale nebo pro pokud k ze lze jako",
        "ru": "и в не на что с по это как из к он для или если от будет при",
        "uk": "і в не на що з до це як та у за для або якщо від при є",
        "sv": "och i att det som en på är av för med den ett du kan om till eller inte",
        "da": "og i at det er en den til på som med for et du kan hvis eller ikke af",
        "nb": "og i det er at en på som til med for av et du kan hvis eller ikke",
        "fi": "ja on ei se että hän oli mutta kun niin ovat tai jos voi joka jotka sen kuin myös sekä tämä voidaan kaikki "
        "mukaan joita jossa jolla kuten jälkeen käyttää",
        "hu": "a az és nem hogy egy is de ez van meg vagy ha el ki által lehet",
        "ro": "și de la în a nu cu pe un o este din să se sau care pentru şi",
        "tr": "bir ve bu da de için ile ne o gibi çok veya olarak olan her en bunu daha kadar sonra eğer ise ya",
        "el": "και το να η του της με για που ο σε από την τα των ή αν στο είναι",
        "bg": "и на да не се в за от е с че или ако по са",
        "id": "yang dan di ini itu dengan untuk dari tidak dalam atau pada ke adalah jika akan dapat sebuah",
    }.items()
}


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """The tags that the identifier can return."""
    return frozenset(str(label) for label in _identifier().labels)


def sample(text: str) -> str:
    """A slice from the middle of `text`."""
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    return text[start : start + SAMPLE_CHARS]


def slices(text: str) -> list[str]:
    """Up to `SLICES` slices of `text` that do not overlap, evenly spread; all of a short text."""
    count = min(SLICES, -(-len(text) // SAMPLE_CHARS))
    starts = [(len(text) - SAMPLE_CHARS) * i // (count - 1) for i in range(count)] if count > 1 else [0]
    return [text[start : start + SAMPLE_CHARS] for start in starts]


def identify(text: str) -> tuple[str, float]:
    """(language tag, probability) of a text; ("und", 0.0) if there are too few letters."""
    part = sample(text)
    if sum(character.isalpha() for character in part) < 20:
        return "und", 0.0
    language, probability = _identifier().classify(part)
    return str(language), float(probability)


def contradicts(label: str, text: str) -> str | None:
    """The language of most of `text` if it is certainly not `label`; None if the label may be right."""
    base = label.replace("-", "_").split("_")[0]
    if len(text) < 100:
        return None
    found = _refuted(base, sample(text))
    if found is None or len(text) <= SAMPLE_CHARS:
        return found
    judged = [_refuted(base, part) for part in slices(text)]
    return found if 2 * sum(other is not None for other in judged) > len(judged) else None


def _refuted(base: str, part: str) -> str | None:
    """The language of one slice if it is certainly not `base`; None otherwise."""
    found, probability = identify(part)
    if found in ("und", base) or probability < SURE:
        return None
    if any(found in group and base in group for group in _RELATIVES):
        return None
    if base in known_languages():
        return found
    # For a label that the identifier does not know, only clear English counts, which is frequent in translated manuals.
    words = set(part.lower().split())
    return "en" if found == "en" and len(words & STOP_WORDS["en"]) >= 5 else None
