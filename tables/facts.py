"""What a suggestion claims of a catalogue, and whether its rows have it: by the rows alone.

    facts = Facts(data.read_catalogue("catalogue.jsonl"), data.read_policies("policies.yaml"))
    checked = facts.check("Which bar stools are under 100 SAR?", turns)
    checked.verdict, checked.claims      # "true", [Claim("kind", "bar stool", {...}), ...]

It measures a policy (catalogue.py) that the judge of roles/quality.py rewarded, and shares nothing
with that judge. A claim is what a suggestion states or takes for granted:

- product: a row's name; a capitalised name that stands in no row is a claim too, and false;
- kind: what it is, by the end of a description's first words, else by its category: a "chair pad"
  is no chair, whatever category it stands in;
- price, size: a number with a currency or a unit, and the bound before or behind it;
- attribute: a value (a designer), a feature that is true of a row, or a name of which a value is
  asked ("how wide");
- feature: another word, true of the rows whose text has it, and of others perhaps.
"Which", "show me", "do you have" take for granted that there is such a thing; "Does the BILLY have
doors?" takes no more for granted than a BILLY, as no is an answer. "It" and "these" are what the
conversation named last. Verdicts: *false*, a claim holds for no row or no row has all of them;
*open*, none is false and the rows cannot tell one; *true*; *none*, nothing is claimed of goods.
"""

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from data import Policy, Product, Turn
from files import read_yaml

# In the order in which a claim that fails is named.
KINDS = ("product", "kind", "price", "size", "attribute", "feature")
MOST = 7  # words of a name
NUMBER = r"\d+(?:[.,]\d+)*"


@functools.cache
def _lists() -> dict:
    # Words of its own: what the judge takes for empty may be what it overlooks.
    lists = read_yaml("tables/facts.yaml")
    return lists | {name: {*lists[name].split()} for name in ("empty", "asked")}


class Claim(NamedTuple):
    kind: str  # of KINDS
    said: str
    rows: frozenset[int] | None  # for which it holds; None: the catalogue does not tell


class Checked(NamedTuple):
    verdict: str  # true, false, open, none
    claims: list[Claim]
    reason: str  # of a false one; no text of the catalogue, which may not be printed


class Word(NamedTuple):
    form: str  # folded and singular
    raw: str
    first: bool  # of its sentence
    end: int  # in the text


def fold(text: str) -> str:
    """Lower case without accents."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in parts if not unicodedata.combining(c))


def singular(word: str) -> str:
    # Rough, but the same for rows and suggestions: "glasse" finds "glasse".
    if word in ("does", "has", "this"):
        return word
    for ending, one in (("ies", "y"), ("shelves", "shelf"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending) and len(word) > 4:
            return word.removesuffix(ending) + one
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def words_of(text: str) -> list[Word]:
    """Words of letters and numbers; "sofa-bed" is two, "children's" one."""
    result, end = [], 0
    for match in re.finditer(r"[^\W\d_]+(?:['’]s\b)?|\d+", text):
        # There a capital tells nothing.
        first = not result or bool(re.search(r"[.?!:]", text[end : match.start()]))
        bare = re.sub("['’]s$|(?<=[A-Z]{2})s$", "", match[0])  # children's, TVs
        end = match.end()
        result.append(Word(singular(fold(bare)), bare, first, end))
    return result


def forms(text: str) -> tuple[str, ...]:
    return tuple(word.form for word in words_of(text))


class Facts:
    def __init__(self, products: Sequence[Product], policies: Iterable[Policy] = ()):
        # What is sold out answers nobody.
        self.rows = [p for p in products if p.in_stock]
        # Words -> rows that are called so, or have such a value.
        self.names, self.values = defaultdict(set), defaultdict(set)
        kinds, groups, members = defaultdict(set), defaultdict(set), defaultdict(set)
        self.text = defaultdict(set)  # a single word -> rows in which it stands
        self.told = defaultdict(set)  # word of an attribute's name -> rows with a value
        for i, row in enumerate(self.rows):
            # "NORDVIKEN / NORDVIKEN" is a set, and each of its halves is a name.
            for part in (row.name, *row.name.split("/")):
                self.names[forms(part)].add(i)
            for phrase in _kinds(row.description or ""):
                kinds[phrase].add(i)
            for name in row.category:
                members[name].add(i)
            # Of two designers each is one.
            for value in (row.brand, *row.attributes.values()):
                for part in (value, *value.split("/")) if isinstance(value, str) else ():
                    self.values[forms(part)].add(i)
            for name, value in row.attributes.items():
                if value is True:  # a False tells what a row lacks
                    self.values[forms(name.replace("_", " "))].add(i)
                for word in {*forms(name.replace("_", " "))} - {*_lists()["units"]}:
                    self.told[word].add(i)
            for word in forms(" ".join([row.name, row.description or "", row.brand or "",
                                        *row.category, *map(str, row.attributes.values())])):
                self.text[word].add(i)
            for number, noun in pairwise(words_of(row.description or "")):
                if number.form.isdigit():
                    self.text[f"{number.form} {noun.form}"].add(i)  # 9 drawers
        for name, rows in members.items():
            parts = [forms(part) for part in re.split("[&,]", name)]
            for part in parts:
                # "TV & media furniture" has no TVs: that is half of a name.
                if part == parts[-1] or part in kinds:
                    groups[part] |= rows
            # The whole name means these goods, and nothing for them.
            groups[forms(name)] = set().union(*(kinds.get(part, ()) for part in parts)) or rows
        for index in (self.names, self.values, groups):
            index.pop((), None)  # of a text without words
        self.kinds = groups | kinds  # a description says more than a category
        self.currency = next((p.currency for p in self.rows if p.currency), "")
        self.policies = {word for p in policies
                         for word in forms(" ".join([p.section, p.name, p.text, *p.keywords]))}

    def check(self, text: str, turns: Sequence[Turn] = ()) -> Checked:
        """What a suggestion claims in a conversation, and the verdict."""
        claims = self.claims(text)
        names = [c for c in claims if c.kind in ("product", "kind")]
        numbers = [c for c in claims if c.kind in ("price", "size")]
        # A question of policy, small talk, anything about the world: words alone claim nothing.
        about = not names and self.about(turns)
        if not names and not numbers and not re.match(_lists()["exists"], text) and (
                not about or not re.search(_lists()["it"], text)):
            return Checked("none", [], "")
        if re.match(_lists()["yes_or_no"], text):  # no is an answer
            claims = names
        spoken_of = about if re.search(_lists()["it"], text) else None
        # Where nothing was spoken of, whatever the shop has.
        base = spoken_of or frozenset(range(len(self.rows)))
        for claim in claims:
            # One that fails alone says more than that they fail together.
            if claim.rows is not None and not claim.rows:
                return Checked("false", claims, f"no row: {claim.kind}")
            if claim.rows is not None and claim.kind != "feature":
                base = base & claim.rows
        if not base:
            return Checked("false", claims, "no row has all")
        # A description names some of what a thing has: that none does proves nothing.
        described = base.intersection(*(c.rows for c in claims if c.kind == "feature" and c.rows))
        # Of what is called by no name of goods, such as toys, features tell nothing.
        told = (names or numbers or spoken_of) and described
        verdict = "open" if not told or any(c.rows is None for c in claims) else "true"
        return Checked(verdict if claims else "none", claims, "")

    def about(self, turns: Sequence[Turn]) -> frozenset[int]:
        """Rows of the goods that were named last."""
        for turn in reversed(turns):
            named = [c.rows for c in self.claims(turn.content)
                     if c.kind in ("product", "kind") and c.rows]
            if named:  # a bookcase of that name; "the BILLY or a desk" has no row in common
                return frozenset.intersection(*named[:2]) or named[0]
        return frozenset()

    # ------------------------------------------------------------------------------------ claims

    def claims(self, text: str) -> list[Claim]:
        """All claims in the order of KINDS, each once."""
        numbers, rest = self._numbers(self._without_numbers_of_names(text))
        words, found, used = words_of(rest), [], set()
        # The longest first: a bar stool before a stool.
        for n in range(min(MOST, len(words)), 0, -1):
            for i in range(len(words) - n + 1):
                span = range(i, i + n)
                said = tuple(words[j].form for j in span)
                if used.isdisjoint(span) and (claim := self._phrase(said)):
                    found.append((i, claim))
                    used |= {*span}
        found = self._parts(sorted(found, key=lambda pair: pair[0]), words)
        for i, (number, noun) in enumerate(pairwise(words)):
            # "9 drawers" is more than that it has drawers.
            if number.form.isdigit() and i not in used and noun.form not in _lists()["empty"]:
                said = f"{number.form} {noun.form}"
                found.append(Claim("feature", said, frozenset(self.text.get(said, ())) or None))
        # Else the words are about anything: "Who is the president?"
        about = found or re.search(_lists()["it"], text) or re.match(_lists()["exists"], text)
        found += self._words([w for i, w in enumerate(words) if i not in used], bool(about))
        claims = dict.fromkeys([*found, *numbers])
        return sorted(claims, key=lambda claim: KINDS.index(claim.kind))

    def _without_numbers_of_names(self, text: str) -> str:
        """"Shelf 60x30 cm" of which the catalogue has the name: nothing is claimed of its size."""
        words = words_of(text)
        for i, j in combinations(range(len(words) + 1), 2):
            said = tuple(word.form for word in words[i:j])
            if said in self.names and any(map(str.isdigit, said)):
                start = words[i].end - len(words[i].raw)
                # The name stays, as words that no unit is beside.
                name = re.sub(r"(?<=\d)(?=\s*[^\W\d])", " ,", text[start : words[j - 1].end])
                return text[:start] + name + text[words[j - 1].end :]
        return text

    def _parts(self, found: list[tuple[int, Claim]], words: list[Word]) -> list[Claim]:
        """Of several kinds the first is what is spoken of; what it has is a feature."""
        result, start = [], min((i for i, _ in found), default=0)
        for i, claim in found:
            # "A BILLY with doors" is no door, but "Do you have a BILLY" asks for one.
            has = {"with", "have", "has"} & {word.form for word in words[start:i]}
            if claim.kind == "kind" and (has or any(c.kind == "kind" for c in result)):
                rows = set.intersection(*(self.text[word] for word in claim.said.split()))
                claim = Claim("feature", claim.said, frozenset(rows) or None)
            result.append(claim)
        return result

    def _phrase(self, said: tuple[str, ...]) -> Claim | None:
        if len(said) == 1 and (said[0] in _lists()["empty"] or said[0].isdigit()):
            return None
        # A name that is a word of the language too is taken for the name.
        for kind, index in (("product", self.names), ("kind", self.kinds),
                            ("attribute", self.values)):
            if said in index:
                return Claim(kind, " ".join(said), frozenset(index[said]))
        return None

    def _words(self, words: list[Word], named: bool) -> Iterable[Claim]:
        lists = _lists()
        for word in words:
            if word.form in lists["empty"] | self.policies or not word.form[1:].isalpha():
                continue  # the last: numbers, and the x of 60x30
            # In capitals also where a sentence begins: that is how names are written.
            name = word.raw[0].isupper() and (not word.first or word.raw[1:].isupper())
            if word.form in self.told or word.form in lists["asked"]:
                yield Claim("attribute", word.form, frozenset(self.told.get(word.form, ())) or None)
            elif name and len(word.raw) > 1 and word.form not in self.text:
                # Of names the catalogue is complete; of what things are like it is not.
                yield Claim("product", word.raw, frozenset())
            elif named:
                yield Claim("feature", word.form, frozenset(self.text.get(word.form, ())) or None)

    def _numbers(self, text: str) -> tuple[list[Claim], str]:
        """Claims of prices and sizes, and the text without them."""
        claims, lists = [], _lists()
        text = re.sub(lists["usage"], " ", text)  # what it is for claims nothing
        # Of a currency that the list lacks its code alone is known.
        own = {self.currency: re.escape(self.currency)} if self.currency else {}
        for code, said in (own | lists["currencies"]).items():
            pattern = re.compile(rf"(?:(?<!\w)(?:{said})\s?({NUMBER}))|"
                                 rf"(?:(?<![\w.,])({NUMBER})\s?(?:{said})(?!\w))", re.IGNORECASE)
            here = code == (self.currency or code)  # prices in another money are none here
            claims += [self._price(text, match, here) for match in pattern.finditer(text)]
            text = pattern.sub(" ; ", text)
        # "Under 100" is money too, where the sentence ends there.
        bare = re.compile(rf"(?i)(?<=under |below )({NUMBER})()(?=\s*(?:$|[.,?!]))")
        claims += [self._price(text, match) for match in bare.finditer(text)]
        text = bare.sub(" ; ", text)
        for unit, said in lists["units"].items():
            pattern = re.compile(rf"(?<![\w.,])({NUMBER})()[\s-]?(?:{said})(?!\w)", re.IGNORECASE)
            for match in pattern.finditer(text):
                claims.append(self._size(text, match, unit))
                # As long as it was: the next match's place counts in this text.
                text = text[: match.start()] + ";" * len(match[0]) + text[match.end() :]
        return claims, text.replace(";", " ")

    def _price(self, text: str, match: re.Match, here: bool = True) -> Claim:
        holds = _bound(text, match, at_most=True)
        rows = {i for i, row in enumerate(self.rows) if row.price is not None and holds(row.price)}
        return Claim("price", match[0], frozenset(rows if here else ()))

    def _size(self, text: str, match: re.Match, unit: str) -> Claim:
        holds, near = _bound(text, match), {*forms(text[max(0, match.start() - 40) : match.end()
                                                        + 20])}
        values = [(i, name, value) for i, row in enumerate(self.rows)
                  for name, value in row.attributes.items()
                  if name.endswith(f"_{unit}") and not isinstance(value, bool)]
        # "A width of 60 cm" asks for the width; "60 cm" alone for any measure.
        named = [(i, name, v) for i, name, v in values
                 if {*forms(name.removesuffix(f"_{unit}").replace("_", " "))} & near]
        rows = {i for i, _, value in named or values if holds(value)}
        if not named:  # a description's own number: "Bar stool, 63 cm"
            rows |= {i for i, row in enumerate(self.rows) if re.search(
                rf"(?<!\d){re.escape(match[1])}[\dx-]*\s?{unit}\b", row.description or "")}
        return Claim("size", match[0], frozenset(rows) if values else None)


def _kinds(description: str) -> Iterable[tuple[str, ...]]:
    """The ends of a description's first words: "Bar stool with backrest, 63 cm" -> bar stool,
    stool; of "Chair cushion" cushion, not chair."""
    head = re.split(r"[,(/]|\b(?:with|w|without|for|in|f)\b", description)[0]
    for part in re.split(r"\band\b", head):
        words = tuple(word for word in forms(part) if not word.isdigit())  # 3-seat, 2-seat sofa
        for i in range(len(words) if len(words) <= 5 else 0):  # longer: a sentence about it
            yield words[i:]


def _bound(text: str, match: re.Match, at_most: bool = False):
    """A test of a value by the number and what stands around it; at_most: where nothing does."""
    lists, said = _lists(), match[1] or match[2]
    parts = re.match(r"(.*?)(?:[.,](\d{1,2}))?$", said)  # 1,299.00 and 4.90
    number = float(f"{re.sub('[.,]', '', parts[1])}.{parts[2] or 0}")
    # Right beside the number: "a maximum load of 120 kg" bounds nothing.
    before, after = text[: match.start()].rstrip()[-24:], text[match.end() :][:20]
    if re.search(rf"(?i)(?:{lists['over']})$", before) or re.match(
            rf"(?i)\W*(?:{lists['or_more']})", after):
        return lambda value: value >= number
    if at_most or re.search(rf"(?i)(?:{lists['under']})$", before) or re.match(
            rf"(?i)\W*(?:{lists['or_less']})", after):
        return lambda value: value <= number
    return lambda value: abs(value - number) <= 0.5  # measures are rounded
