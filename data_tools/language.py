"""Languages: identification with the model that ships inside `py3langid`, and the little that filters must know of each.

Notable features:
- identification looks at a slice from the middle of a text: beginnings are titles and licences, and the cost stays 1 ms
- a label is doubted only when the identifier is sure and could have known the label: it tells 97 languages apart, and near
  relatives (Croatian and Serbian, Indonesian and Malay) count as one
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

SAMPLE_CHARS = 600
SURE = 0.95

_RELATIVES = tuple(
    frozenset(group.split())
    for group in (
        "hr bs sr sl", "id ms jv zlm min", "nb no nn da sv", "cs sk", "pt gl es oc ca an", "zh zh_CN zh_TW",
        "ru uk be bg mk ky mn kk", "fa ur ar ps ug ku", "hi mr ne", "af nl lb de", "az tr tk uz", "xh zu rw",
        "it rm fur co la eo", "bn as", "fr wa frp",
    )
)  # fmt: skip

# Gopher's stop-word test for other languages than English: very frequent function words.
STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the be to of and that have with in is a for it",
        "de": "der die das und ist nicht ein zu in mit den von sie auf",
        "fr": "le la les de et est un une que pas dans pour des en",
        "es": "el la los de y que en un una no con por para se",
        "it": "il la di e che un una non per in del con sono le",
        "pt": "o a os de e que um uma não para com em do da",
        "nl": "de het een en van is niet dat in op te zijn met",
        "pl": "i w nie na się z do to że jest o jak za",
        "cs": "a v se na je to že s z do o i ale",
        "ru": "и в не на что с по это как из к он для",
        "uk": "і в не на що з до це як та у за для",
        "sv": "och i att det som en på är av för med den",
        "da": "og i at det er en den til på som med for",
        "nb": "og i det er at en på som til med for av",
        "fi": "ja on ei se että hän oli mutta kun niin ovat",
        "hu": "a az és nem hogy egy is de ez van meg",
        "ro": "și de la în a nu cu pe un o este din",
        "tr": "bir ve bu da de için ile ne o gibi çok",
        "el": "και το να η του της με για που ο σε",
        "bg": "и на да не се в за от е с че",
        "id": "yang dan di ini itu dengan untuk dari tidak dalam",
    }.items()
}


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """The tags that the identifier can give."""
    return frozenset(str(label) for label in _identifier().labels)


def sample(text: str) -> str:
    """A slice from the middle of `text`."""
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    return text[start : start + SAMPLE_CHARS]


def identify(text: str) -> tuple[str, float]:
    """(language tag, probability) of a text; ("und", 0.0) where there is nothing to judge by."""
    part = sample(text)
    if sum(character.isalpha() for character in part) < 20:
        return "und", 0.0
    language, probability = _identifier().classify(part)
    return str(language), float(probability)


def contradicts(label: str, text: str) -> str | None:
    """The language that `text` surely is when that is another than `label`; None when the label may stand."""
    base = label.replace("-", "_").split("_")[0]
    if len(text) < 100:
        return None
    found, probability = identify(text)
    if found in ("und", base) or probability < SURE:
        return None
    if any(found in group and base in group for group in _RELATIVES):
        return None
    if base in known_languages():
        return found
    # A language that the identifier does not know can still be refuted by English, which translated manuals are full of.
    words = set(sample(text).lower().split())
    return "en" if found == "en" and len(words & STOP_WORDS["en"]) >= 5 else None
