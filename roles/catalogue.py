"""A shop's catalogue as words: which products, brands and categories a text names.

    catalogue = Catalogue(data.read_catalogue("catalogue.jsonl"))
    catalogue.mention("Which kettles by Brenwick keep warm?").brands

Words are compared by rough stems; what counts as a stop word, a unit or a currency stands in
quality.yaml. The judge of quality.py is its one user.
"""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from data import Product
from files import cache_texts
from roles import text as texts

# ------------------------------------------------------------------------------------------ words


@functools.cache
def lexicon() -> dict[str, dict]:
    """quality.yaml: patterns as regular expressions, words as stems, the rest as it stands."""
    sections = texts.read_yaml("quality.yaml")
    patterns = {key: re.compile("|".join(lines.splitlines()), re.IGNORECASE)
                for key, lines in sections["patterns"].items()}
    words = {key: {stem(word) for word in lines.split()}
             for key, lines in sections["words"].items()}
    words["stop"] = {stem(word) for word in texts.lexicon()["words"]["stop"]} - {"case"}
    return sections | {"patterns": patterns, "words": words}


def fold(word: str) -> str:
    """Lower case without accents, as people without that key write: Bestå's -> besta."""
    parts = unicodedata.normalize("NFKD", re.sub("['’]s$", "", word.casefold()))
    return "".join(c for c in parts if not unicodedata.combining(c))


_ENDINGS = ("ations", "ation", "ments", "ment", "ings", "ing", "ers", "er", "ies", "ed", "es", "s",
            "e", "y")


@cache_texts(50_000)
def stem(word: str) -> str:
    """A rough stem: cancelling, cancellation -> cancel; batteries, battery -> batter."""
    word = fold(word)
    if word in ("mice", "mouse"):
        return "mouse"
    for least in (3, 4):  # two endings at most: deliver-y, deliv-er
        ending = next((e for e in _ENDINGS if word.endswith(e) and not (
            e == "s" and word.endswith("ss"))), "")
        if len(word) - len(ending) >= least:
            word = word.removesuffix(ending)
    return re.sub(r"([^aeiou])\1$", r"\1", word)[:7]  # runn -> run


_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


def tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def stems(text: str) -> list[str]:
    return [stem(word) for word in tokens(text)]


def content(text: str) -> list[str]:
    """Stems of words that say what is wanted: no stop words, none of shopping in general."""
    words = lexicon()["words"]
    return [s for s in stems(text) if s not in words["stop"] | words["shop"] and len(s) > 1
            and not s.isdigit()]


def spans(words: list[str], most: int) -> Iterable[tuple[int, int]]:
    """(start, end) of runs of up to `most` words, long ones first."""
    for n in range(min(most, len(words)), 0, -1):
        for i in range(len(words) - n + 1):
            yield i, i + n


def kinds_of(description: str) -> Iterable[tuple[str, ...]]:
    """Stems of what people call a product: "Bar table, 51x51 cm" -> (bar, table), (table)."""
    said = re.split(r"[,(/]|\b(?:with|w|without|for|in)\b", description)[0]
    for kind in re.split(r"\band\b", said):
        words = [word for word in stems(kind) if not word.isdigit()]
        for i in range(len(words) if len(words) <= 5 else 0):  # longer: a sentence about it
            if len(words) - i > 1 or words[i] not in lexicon()["words"]["shop"]:
                yield tuple(words[i:])


def parts_of(category: str) -> list[str]:
    """Sofas, armchairs of "Sofas & armchairs"; of "TV & media furniture" TV furniture, no TVs."""
    parts = [part.strip() for part in re.split(r"&|,|/|\band\b", category) if part.strip()]
    head = parts[-1].split()[1:][-1:] if parts else []  # of several words
    return [part if part.endswith("s") or part == parts[-1] else " ".join([part, *head])
            for part in parts]


# ------------------------------------------------------------------------------------ the catalogue


class Mention(NamedTuple):
    """What a text names of the catalogue."""

    categories: list[str]
    products: list[int]
    brands: list[str]
    words: set[str]  # the stems that do so
    goods: set[int]  # the products that the first word for goods names


class Catalogue:
    """Products by number, and which of them a word, a brand or a category stands for."""

    def __init__(self, products: list[Product]):
        self.products = [p for p in products if p.in_stock]
        self.bag, self.of_category, self.of_brand = defaultdict(set), defaultdict(set), {}
        self.names, phrases = defaultdict(list), defaultdict(set)  # phrases: stems -> categories
        for i, product in enumerate(self.products):
            for category in product.category:
                self.of_category[category].add(i)
            if product.brand:
                self.of_brand.setdefault(tuple(stems(product.brand)), set()).add(i)
            # Not by stems: a bill is no BILLY.
            self.names[tuple(map(fold, tokens(product.name)))].append(i)
            for word in self._words(product):
                self.bag[word].add(i)
        # Groups such as a department name no goods: "lamps for a kitchen" is about lamps.
        for category in {p.category[0]: None for p in self.products}:
            for part in parts_of(category):
                if phrase := tuple(stems(part)):
                    phrases[phrase].add(category)
        heads = Counter(phrase[-1:] for phrase in {*phrases})
        for phrase in [*phrases]:  # "speakers" for portable speakers, where there are no others
            if len(phrase) > 1 and heads[phrase[-1:]] == 1:
                phrases[phrase[-1:]] |= phrases[phrase]
        # What a product is, by its description: in a category "chairs" pads and covers are none.
        self.goods = defaultdict(set)
        for i, product in enumerate(self.products):
            for phrase in kinds_of(product.description or ""):
                self.goods[phrase].add(i)
        self.phrases = {phrase: {Counter(self.products[i].category[0] for i in some).most_common(
            1)[0][0]} for phrase, some in self.goods.items()} | phrases
        self.numbers = defaultdict(dict)  # attribute -> product -> value
        for i, product in enumerate(self.products):
            for name, value in product.attributes.items():
                if not isinstance(value, bool) and isinstance(value, int | float):
                    self.numbers[name][i] = value
        self.called = {stem(word) for name in self.names for word in name}
        self.longest = max(map(len, [*self.names, *self.phrases, *self.of_brand]), default=1)

    @staticmethod
    def _words(product: Product) -> set[str]:
        said = [product.name, product.brand or "", product.description or "", *product.category]
        for name, value in product.attributes.items():
            if value is not False:  # what it lacks does not describe it
                said.append(name.replace("_", " "))
            said += value if isinstance(value, list) else [value] * isinstance(value, str)
        return {word for text in said for word in stems(text)}

    def mention(self, text: str) -> Mention:
        """Names of products and brands in a text, the longest first, and its first category."""
        # A second one narrows the first: a sofa bed, a bench for shoes.
        words, found, used, categories = stems(text), Mention([], [], [], set(), set()), set(), {}
        stop, folded = lexicon()["words"]["stop"], [*map(fold, tokens(text))]
        for i, j in spans(words, self.longest):
            span, name = tuple(words[i:j]), tuple(folded[i:j])
            if used & {*range(i, j)} or (j - i == 1 and span[0] in stop):
                continue
            if name in self.names:
                found.products.extend(self.names[name])
            elif span in self.of_brand:
                found.brands.append(span)
            elif span in self.phrases:
                categories[i] = span
            else:
                continue
            used |= {*range(i, j)}
            found.words.update(span if i not in categories else ())
        # What a product that is named has or comes with is no other goods.
        has = [i for i, word in enumerate(words) if word in ("hav", "has", "with")
               and found.products and {*words[:i]} & found.words]
        categories = {i: span for i, span in categories.items() if i < min(has, default=i + 1)}
        if categories:
            first = categories[min(categories)]
            found.categories.extend(sorted(self.phrases[first]))
            found.words.update(first)
            found.goods.update(self.goods.get(first) or set().union(
                *(self.of_category[category] for category in self.phrases[first])))
        return found

    def known(self, word: str, among: set[int]) -> set[int]:
        """Which of these products a word describes; a longer or shorter form of it will do."""
        found = self.bag.get(word, set()) & among
        if not found and len(word) >= 4:
            for other, products in self.bag.items():
                if len(other) >= 4 and (other.startswith(word) or word.startswith(other)):
                    found = found | (products & among)
        return found
