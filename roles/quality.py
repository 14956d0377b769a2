"""Is a suggestion for a shop's assistant answerable, true and informative? The judge by rule.

    judge = Rules(data.read_catalogue("catalogue.jsonl"), data.read_policies("policies.yaml"))
    [[verdict]] = judge.quality([(dialogue, ["Which kettles have a keep-warm function?"])])
    verdict.reward, verdict.source    # 1.0, "product p17: Brenwick Aria 300, 39 EUR, keep_warm"

QualEQS, section 3.3 and appendix C: answerability (who speaks, scope, privacy), factuality (against
the catalogue: prices, features, brands) and information gain (a new constraint, no vague budget, no
repetition). Departure: rules over catalogue and policies, where the paper prompts a 30B model;
prompted.py has that form, with the same method. What a rule does not know counts as false: a
suggestion that nothing in the shop answers is worth less than one too few.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from data import Dialogue, Policy, Product
from roles.catalogue import Catalogue, Mention, content, lexicon, stem, stems, tokens
from roles.safety import is_unsuitable

COVERED = 0.65  # of a question's words, by weight, that policies must have to answer it
UNKNOWN = 0.7  # weight of a word that none has; of one in n policies it is 1 / n
CLOSE = 0.02  # relative: "24 hours" of an attribute


class Verdict(NamedTuple):
    """0 or 1 each, nan where a call failed; what answers it, and why not."""

    answerable: float
    factual: float
    informative: float
    source: str = ""  # product, attribute or policy; empty where nothing answers it
    reason: str = ""  # of the first 0

    @property
    def reward(self) -> float:
        return self.answerable * self.factual * self.informative  # Eq. (4)


FAILED = Verdict(*[float("nan")] * 3, reason="the judge's call failed")


def without_repeats(suggestions: list[str], verdicts: list[Verdict]) -> list[Verdict]:
    """The verdicts; what asks again what a good one above it asks is not informative.

    The same is asked in the same words, numbers apart, or where one policy answers both. Unstated:
    by verdicts that know no neighbours, RL learns to ask one good question three times.
    """
    above, result = set(), []
    for text, verdict in zip(suggestions, verdicts, strict=True):
        asks = {frozenset(s for s in stems(text) if not s.isdigit()) - lexicon()["words"]["stop"]}
        asks |= {verdict.source} if verdict.source.startswith("policy ") else set()
        if verdict.reward == 1:  # nan is not: nobody judged it
            if asks & above:
                verdict = verdict._replace(informative=0.0, reason="repeats another")
            above |= asks
        result.append(verdict)
    return result


class Bound(NamedTuple):
    """A number that a suggestion asks for."""

    low: float
    high: float
    unit: str  # ending of an attribute's name, or "price"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


class Subject(NamedTuple):
    """What a conversation is about so far."""

    mention: Mention  # of the latest turn that names something
    categories: set[str]  # of all turns
    said: set[str]  # stems of the shopper's turns
    last: set[str]  # of the latest of them
    policy: str  # that the latest of them is about, or ""


class Rules:
    """Judges suggestions against a shop's catalogue and policies."""

    def __init__(self, products: list[Product], policies: list[Policy]):
        self.catalogue, self.policies = Catalogue(products), policies
        self.policy_words = [set(content(" ".join([p.section, p.name, *p.keywords])))
                             for p in policies]
        self.policy_texts = [set(content(p.text)) | words
                             for p, words in zip(policies, self.policy_words, strict=True)]
        self.rarity = Counter(itertools.chain.from_iterable(self.policy_texts))
        currencies = Counter(p.currency for p in products if p.currency)
        self.currency = currencies.most_common(1)[0][0] if currencies else ""
        money = lexicon()["currencies"]
        others = "|".join(said for code, said in money.items() if code != self.currency)
        self.other_money = re.compile(rf"(?:{others})\s?\d|\d\s?(?:{others})(?!\w)", re.IGNORECASE)
        # Then a word that none of them has is not told of any; attributes alone have few words.
        self.described = sum(bool(p.description) for p in products) > len(products) / 2
        # Whether names are written in capitals here, or these are abbreviations.
        self.loud = sum(p.name.isupper() for p in products) > len(products) / 2

    def quality(self, rows: Iterable[tuple[Dialogue, list[str]]]) -> list[list[Verdict]]:
        """A verdict on each suggestion of each (context, suggestions)."""
        return [[self._judge(text, subject) for text in suggestions]
                for dialogue, suggestions in rows for subject in [self._subject(dialogue)]]

    def excerpt(self, dialogue: Dialogue, suggestions: list[str]) -> dict:
        """What the shop has of the goods that these texts name, and its policies: for an LLM."""
        named = [self._subject(dialogue).mention, *map(self.catalogue.mention, suggestions)]
        categories = {c: None for mention in named for c in sorted(self._categories(mention))}
        goods = {}
        for category in [*categories][:4]:
            products = [self.catalogue.products[i] for i in self.catalogue.of_category[category]]
            prices = sorted(p.price for p in products if p.price is not None)
            goods[category] = {
                "products": len(products), "brands": sorted({p.brand for p in products if p.brand}),
                "prices": [*prices[:1], *prices[-1:], self.currency],
                "attributes": sorted({name for p in products for name in p.attributes})}
        return {"goods": goods, "policies": [f"{p.name}: {p.text}" for p in self.policies[:60]]}

    def _subject(self, dialogue: Dialogue) -> Subject:
        mention, categories = Mention([], [], [], set(), set()), set()
        for turn in dialogue.turns:
            found = self.catalogue.mention(turn.content)
            if found.categories or found.products:
                mention = found if turn.role == "user" or not mention.products else mention
                categories |= self._categories(found)
        said = [turn.content for turn in dialogue.turns if turn.role == "user"]
        latest = self.catalogue.mention(said[-1])
        policy, _ = self._policy(said[-1], latest.words)
        # However the shopper puts it, the assistant's answer tells that it was about one.
        if not policy and dialogue.turns[-1].role == "assistant":
            policy, _ = self._policy(dialogue.turns[-1].content, latest.words)
        if not latest.categories and not latest.products and not policy:
            categories = set()  # small talk: any subject will do next
        return Subject(mention, categories, {*_asked(" ".join(said))}, {*stems(said[-1])}, policy)

    def _categories(self, mention: Mention) -> set[str]:
        named = {self.catalogue.products[i].category[0] for i in mention.products[:20]}
        return named | {*mention.categories}

    def _judge(self, text: str, subject: Subject) -> Verdict:
        patterns = lexicon()["patterns"]
        for name in ("privacy", "assistant", "scope"):
            if patterns[name].search(text):
                return Verdict(0, 1, 1, reason=name)
        if is_unsuitable(text):
            return Verdict(0, 1, 1, reason="unsuitable")
        rest, usage = _usage(text, self.catalogue)
        named = self.catalogue.mention(rest)
        if patterns["it"].search(text) and subject.mention.products and not named.products:
            named = Mention([], [], named.brands, set(), set())  # "Does it have doors?" is no door
        policy, covered = self._policy(text, named.words)
        if policy and not (named.categories and covered < 1) and not self._bounds(text)[0]:
            return self._by_policy(text, policy, subject)
        if not (named.categories or named.products or named.brands) and not (
            subject.mention.categories or subject.mention.products or subject.categories
            or self._bounds(text)[0]
        ):
            return Verdict(0, 1, 1, reason="scope")
        return self._by_catalogue(rest, usage, named, subject)

    # -------------------------------------------------------------------------------- policies

    def _policy(self, text: str, ignored: set[str]) -> tuple[str, float]:
        """(id of the policy that answers a question, the share of its words that it has)."""
        words = {w for w in content(text) if w not in ignored}
        best, best_score = "", 0.0
        # Rare words tell policies apart; one that no policy has may be about anything.
        weight = {w: 1 / self.rarity[w] if self.rarity[w] else UNKNOWN for w in words}
        share = sum(weight[w] for w in words if self.rarity[w]) / (sum(weight.values()) or 1)
        for policy, names, all_words in zip(self.policies, self.policy_words, self.policy_texts,
                                            strict=True):
            covered = sum(weight[w] for w in words & all_words)
            score = covered + sum(weight[w] for w in words & names)
            if score > best_score and words & names:
                best, best_score = policy.id, score
        return (best, share) if share >= COVERED else ("", share)

    def _by_policy(self, text: str, policy: str, subject: Subject) -> Verdict:
        # It deepens the intent where policies are what is asked about (appendix C, rule 3). Else
        # delivery and payment do for everybody, and one list for all contexts is strictly right.
        reason = ("another subject" if not subject.policy else
                  "repetition" if policy == subject.policy else "")
        answer = next(p.text for p in self.policies if p.id == policy)
        return Verdict(1, 1, float(not reason), f"policy {policy}: {answer}", reason)

    # ------------------------------------------------------------------------------- catalogue

    def _bounds(self, text: str) -> tuple[list[Bound], str]:
        """(numbers asked for, the text without them)."""
        words, bounds = lexicon(), []
        number = r"(\d[\d.,]*\d|\d)"
        money = words["currencies"].get(self.currency, re.escape(self.currency) or "€")
        for unit, said in ({"price": money} | words["units"]).items():
            before = rf"(?:(?:{said})\s?{number})|" if unit == "price" else ""
            pattern = re.compile(rf"(?<![\w.,])(?:{before}{number}[\s-]?(?:{said}))(?!\w)",
                                 re.IGNORECASE)
            for match in pattern.finditer(text):
                value = next(group for group in match.groups() if group)
                bounds.append(self._bound(text, match, _amount(value), unit))
            text = pattern.sub(" # ", text)
        # "Under 100" is about money.
        least, most = (words["patterns"][name].pattern for name in ("at_least", "at_most"))
        bare = re.compile(rf"(?:(?P<least>{least})|{most})\s+{number}"
                          r"(?=\s*(?:$|[.,?!]|(?:for|with|that|which|in|please)\b))", re.IGNORECASE)
        for match in bare.finditer(text):
            value = _amount(match[match.lastindex])
            bounds.append(Bound(value, float("inf"), "price") if match["least"] else
                          Bound(0, value, "price"))
        return bounds, bare.sub(" # ", text)

    @staticmethod
    def _bound(text: str, match: re.Match, value: float, unit: str) -> Bound:
        patterns = lexicon()["patterns"]
        before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() :][:40]
        # Directly before the number: a "maximum load of 120 kg" is no limit of it.
        near = re.sub(r"(?:\bof)?\W*$", "", before)
        least, most = (re.search(patterns[name].pattern + "$", near, re.IGNORECASE)
                       for name in ("at_least", "at_most"))
        if least or patterns["or_more"].search(after):
            return Bound(value, float("inf"), unit)
        if most or unit == "price" or patterns["or_less"].search(after):
            return Bound(0, value, unit)
        return Bound(value * (1 - CLOSE), value * (1 + CLOSE), unit)

    def _by_catalogue(self, text: str, usage: set[str], named: Mention,
                      subject: Subject) -> Verdict:
        catalogue, patterns = self.catalogue, lexicon()["patterns"]
        if patterns["impossible"].search(text):
            return Verdict(1, 0, 1, reason="impossible feature")
        if patterns["reasons"].match(text):
            return Verdict(0, 1, 1, reason="nothing tells")
        about = named if named.categories or named.products else subject.mention
        among = self._among(text, named, subject)
        bounds, rest = self._bounds(text)
        # "Shelf 60x30 cm" is a name, and asks for no size.
        called = {b for i in named.products for b in self._bounds(catalogue.products[i].name)[0]}
        bounds = [bound for bound in bounds if bound not in called]
        if self.other_money.search(rest):
            return Verdict(1, 0, 1, reason="another currency")
        if self._other_goods(text, named):
            return Verdict(1, 0, 1, reason="unknown goods")
        # What is asked of the products: each narrows them.
        left, asked = among, set()
        for brand in named.brands:
            left = left & catalogue.of_brand[brand]
            asked |= {*brand}
        if not left:
            return Verdict(1, 0, 1, reason="brand not sold here")
        one = named.products or (not named.categories and not named.brands)
        describes = bool(bounds)  # a feature; what only names an attribute asks for its value
        # Goods that were spoken of are no feature: "Which sofas would suit my new armchair?"
        for chunk in self._chunks(rest, named.words | subject.mention.words):
            known = [(word, products) for word, _ in chunk
                     if (products := catalogue.known(word, among))]
            asked |= {word for word, _ in chunk if word in lexicon()["words"]["soft"]}
            chunk = [pair for pair in chunk if pair[0] not in asked or pair[0] in dict(known)]
            if not chunk:
                continue
            strange = [raw for word, raw in chunk if word not in dict(known)]
            # In capitals too, where names are written so: what nothing here is called.
            if any(raw[0].isupper() and (not raw.isupper() or self.loud and not catalogue.known(
                    stem(raw), {*range(len(catalogue.products))})) for raw in strange):
                return Verdict(1, 0, 1, reason="unknown name")
            if not known or strange and (self.described or any(map(str.isdigit, strange))):
                what = re.match(r"(?i)(?:how many|what do)\b", text)
                return (Verdict(0, 1, 1, reason="nothing tells") if one or what
                        else Verdict(1, 0, 1, reason="unknown feature"))
            for word, products in known:
                left, describes = left & products, True
                asked.add(word)
        names = _measures(rest, named.words)
        if names & {"stock"} or names and not describes:
            left = {i for i in left if names & self._attributes(i)}
            if not left:
                return Verdict(0, 1, 1, reason="nothing tells")
        for bound in bounds:
            left = {i for i in left if self._holds(i, bound)}
            asked.add(f"{bound}")
        if not left:
            return Verdict(1, 0, 1, reason="no such product")
        reason = self._uninformative(text, named, subject, asked, usage)
        source = self._source(left, about, asked | names, bounds)
        return Verdict(1, 1, float(not reason), source, reason)

    def _among(self, text: str, named: Mention, subject: Subject) -> set[int]:
        """Numbers of the products that a suggestion is about."""
        catalogue, said = self.catalogue, subject.mention
        if named.products:  # a bookcase of that name, or whatever has it
            return {*named.products} & named.goods or {*named.products}
        if said.products and lexicon()["patterns"]["it"].search(text):
            return {*said.products} & said.goods or {*said.products}
        others = self._categories(said) if not named.brands else ()
        return (named.goods or said.goods or set().union(
            *(catalogue.of_category[c] for c in others)) or {*range(len(catalogue.products))})

    def _other_goods(self, text: str, named: Mention) -> bool:
        """Whether a text asks for goods that nothing here is called: toys, where there is a storage
        for toys."""
        words = lexicon()["words"]
        match = lexicon()["patterns"]["goods"].match(text)
        if not match or named.categories or named.products or named.brands:
            return False
        goods = [*itertools.takewhile(lambda word: word not in words["between"],
                                      stems(text[match.end() :]))]
        # A shop is none of its goods.
        known = (words["shop"] | words["stop"] | self.catalogue.called) - {*stems("shop store")}
        return bool(goods) and not {*goods} & known

    def _chunks(self, text: str, ignored: set[str]) -> list[list[tuple[str, str]]]:
        """Runs of content words, as (stem, word): of "an active noise filter" one, of three."""
        words = lexicon()["words"]
        dull = (words["stop"] | words["shop"] | words["attribute"]) - words["soft"]
        pairs = [(stem(raw), raw) for raw in tokens(text)]
        groups = itertools.groupby(pairs, lambda pair: pair[0] in words["between"] | ignored)
        chunks = [[(word, raw) for word, raw in group
                   if word not in dull and (len(word) > 1 or raw.isdigit())]
                  for parts, group in groups if not parts]
        return [chunk for chunk in chunks if chunk]

    def _attributes(self, i: int) -> set[str]:
        """Stems of the names of what is told of a product."""
        product = self.catalogue.products[i]
        told = [name for name in ("brand", "stock") if getattr(product, name) is not None]
        return {word for name in (*told, *product.attributes)
                for word in stems(name.replace("_", " "))}

    def _holds(self, i: int, bound: Bound) -> bool:
        product = self.catalogue.products[i]
        if bound.unit == "price":
            return product.price is not None and bound.holds(product.price)
        return any(bound.holds(values[i]) for name, values in self.catalogue.numbers.items()
                   if i in values and name.rsplit("_", 1)[-1] == bound.unit)

    def _uninformative(self, text: str, named: Mention, subject: Subject, asked: set[str],
                       usage: set[str]) -> str:
        """Why a suggestion leads no further, or ""."""
        bounds = any("Bound" in word for word in asked)
        if lexicon()["patterns"]["vague"].search(text) and not bounds:
            return "vague budget"
        categories = self._categories(named)
        if categories and subject.categories and not self._related(categories, subject.categories):
            return "another subject"
        # Gifts under 100 euros, whatever is talked about: the next list for everybody.
        anything = {*stems(text)} & lexicon()["words"]["anything"]
        about = subject.categories or subject.policy  # else small talk, which leads to any goods
        if about and anything and not (categories or named.brands):
            return "another subject"
        complement = categories and not categories & self._categories(subject.mention)
        attributes = {*_asked(text)} & (lexicon()["words"]["attribute"] | {"price"})
        new = (asked | usage | attributes) - subject.said
        if new or complement:
            return ""
        return "repetition" if {*stems(text)} <= subject.last else "no new constraint"

    def _related(self, categories: set[str], others: set[str]) -> bool:
        """Whether some product is in one of these as well as in a group with one of the others."""
        ours, theirs = ({group for name in names for i in self.catalogue.of_category[name]
                         for group in self.catalogue.products[i].category}
                        for names in (categories, others))
        return bool(ours & theirs)

    def _source(self, left: set[int], about: Mention, asked: set[str], bounds: list[Bound]) -> str:
        """A product that answers, and by which attributes: the cheapest where the price is asked
        for, else one in the middle, as the cheapest in a category of beds is a knob."""
        some = sorted((self.catalogue.products[i] for i in left), key=lambda p: p.price or 0)
        units = {bound.unit for bound in bounds}
        product = some[0 if "price" in units else len(some) // 2]
        facts = [f"{name} {value}" for name, value in product.attributes.items()
                 if asked & {*stems(name.replace("_", " ")), *stems(str(value))}
                 or name.rsplit("_", 1)[-1] in units]
        price = [] if product.price is None else [f"{product.price:g} {product.currency or ''}"]
        return f"product {product.id}: " + ", ".join([product.name, *price, *facts])


def _asked(text: str) -> list[str]:
    """Stems, with one word for what something costs."""
    price = lexicon()["words"]["price"]
    return ["price" if word in price else word for word in stems(text)]


def _measures(text: str, ignored: set[str]) -> set[str]:
    """Stems of the attributes that a text asks for: width of "How wide is it?"."""
    words = lexicon()
    asked = {*stems(text)} & words["words"]["attribute"] - words["words"]["price"] - ignored
    for pattern, names in words["measures"].items():
        if re.search(rf"(?i)\b(?:{pattern})\b", text):
            asked |= {*stems(names)}
    return asked


def _amount(text: str) -> float:
    """1,299.00, 1.299,00, 1,299 and 4.90 as people write them."""
    whole, mark, part = re.match(r"(.*?)(?:([.,])(\d{1,2}))?$", text).groups()
    return float(re.sub("[.,]", "", whole) + (f".{part}" if mark else ""))


# To the end of the clause, or to where another condition begins.
_FOR = re.compile(r"(?i)\bfor (?:(?!\b(?:under|below|from|that|which)\b)[^,.?!])*")


def _usage(text: str, catalogue: Catalogue) -> tuple[str, set[str]]:
    """(the text without "for ..." where that says what for, the stems of it)."""
    usage: set[str] = set()

    def cut(match: re.Match) -> str:
        before = catalogue.mention(text[: match.start()]).words
        if re.search(r"\d", match[0]) or (catalogue.mention(match[0]).words and not before):
            return match[0]  # "less than 40 euros", "I am looking for a kettle"
        words = lexicon()["words"]
        usage.update({*stems(match[0])} - words["between"] - words["shop"])
        return " "

    return _FOR.sub(cut, text), usage
