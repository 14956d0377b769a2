"""The simulated shop: catalogue, policies, shoppers' contexts, suggestions and few clicks (001).

    python -m world shop --contexts 4000 --seed 7 --out DIR

It stands in for the private logs and the EQS-Benchmark of QualEQS (section 4.1, appendix D). DIR
holds catalogue.jsonl and policies.yaml; dialogues.jsonl, the log, and evaluation.jsonl, contexts
of held-out forms with nothing shown; and apart truth/shop.json (shop_clicks.py) and
truth/cases.json, suggestions whose quality is known, which only the evaluation may read.

A shopper asks with one of four intents, perhaps after an exchange or two about something else, and
an assistant answers from catalogue or policy. A prompted writer then suggests three queries; half
of them have one of the faults of KINDS. Contexts fill the benchmark's places by intent and by
whether anything was clicked, in the paper's proportions. What `fault` names never gets a place, nor
what repeats an earlier context; in the test set no two queries share over NEAR of their bigrams.
"""

import functools
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import garm
from config import ShopConfig
from files import ROOT, read_json, read_yaml, write_json, write_text
from world.dialogue_clicks import stems, words_of
from world.dialogues import Dialogues
from world.shop_clicks import Truth
from world.shop_goods import CURRENCY, DEPARTMENT, Goods, ceiling, money, told

INTENTS = ("small talk", "product recommendation", "product QA", "platform QA")
PARTS = {"clicked": 5914, "unclicked": 10535, "test": 500}  # contexts of the EQS-Benchmark
PER_CATEGORY = 84  # products; 2,436 in all
POLICIES = ROOT / "world" / "shop_policies.yaml"
NEAR = 0.8  # of the bigrams of the shorter of two test queries: nearly the same
NOISE = 0.04  # of raw queries are fragments, garbled or without a word
TRIES = 50  # drawn for a place at most
EXCHANGES = (0.55, 0.3, 0.15)  # share of contexts with none, one or two exchanges before
START = datetime(2026, 3, 2)
NEEDS = (1.0, 0.7, 0.45)  # what the most wanted next query is worth, the second and the third

PRODUCT, ANY = INTENTS[1:3], INTENTS


class Kind(NamedTuple):
    """How a suggestion is made: share in the log, quality (None: undefined), where it occurs."""

    weight: float
    quality: tuple  # (answerable, factual, informative), known because of how it is made
    intents: tuple = PRODUCT


GOOD, FALSE, EMPTY, NOT_ASKED = (1, 1, 1), (1, 0, None), (1, 1, 0), (0, None, None)
KINDS = {
    "brand": Kind(1.0, GOOD), "price": Kind(1.0, GOOD), "feature": Kind(1.0, GOOD),
    "number": Kind(0.8, GOOD), "choice": Kind(0.8, GOOD), "brand and price": Kind(0.6, GOOD),
    "usage": Kind(0.8, GOOD), "complement": Kind(0.6, GOOD),
    "attribute": Kind(1.5, GOOD, INTENTS[2:3]), "policy": Kind(1.2, GOOD, INTENTS[3:]),
    "discovery": Kind(4.0, GOOD, INTENTS[:1]),
    "assistant": Kind(1.2, NOT_ASKED, ANY), "privacy": Kind(0.4, NOT_ASKED, ANY),
    "scope": Kind(0.5, NOT_ASKED, ANY), "absent policy": Kind(0.8, NOT_ASKED, ANY),
    "absent attribute": Kind(0.5, NOT_ASKED), "impossible price": Kind(0.5, FALSE),
    "impossible number": Kind(0.4, FALSE), "impossible feature": Kind(0.4, FALSE),
    "unknown brand": Kind(0.6, FALSE), "brand without it": Kind(0.5, FALSE),
    "vague budget": Kind(1.0, EMPTY), "repetition": Kind(1.0, EMPTY, INTENTS[1:]),
    "criteria": Kind(0.7, EMPTY), "off topic": Kind(0.6, EMPTY),
    "policy aside": Kind(1.2, EMPTY, INTENTS[:3]),  # asked where nobody speaks of policies
}  # fmt: skip


class Context(NamedTuple):
    """What is talked about when suggestions are due."""

    intent: str
    turns: list[tuple[str, str]]  # (user, assistant)
    category: str | None  # None: small talk
    product: data.Product | None  # that the shopper has named
    asked: tuple[str, str]  # the attribute or policy of the last question, and its form's list


class Case(NamedTuple):
    """A suggestion whose quality is known, for measuring a judge."""

    dialogue: data.Dialogue
    suggestion: str
    kind: str
    quality: tuple  # (answerable, factual, informative), None where it is undefined
    part: str  # "log" or "held_out" forms


def load_truth(folder: str | Path) -> Truth:
    """The hidden state of the contexts that were written to this folder."""
    return Truth(read_json(Path(folder) / "truth" / "shop.json"))


def fault(query: str) -> str | None:
    """Why a query has no place in the benchmark (appendix D, by rule), or None."""
    words = [word for word in query.split() if any(map(str.isalpha, word))]
    if len(words) < 3:
        return "fragment"
    # No vowel in a word of four letters or more: no language of the shop has such words.
    odd = [word for word in words
           if len(word) > 3 and not re.search("[aeiouyäöüAEIOUYÄÖÜ]|[A-Z]{2}", word)]
    return "garbled" if len(odd) * 4 >= len(words) else None


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


class Shop:
    """A shop and its hidden state; the same settings give the same bytes.

    Seeds from 100 on are for tuning: their cases have `log` forms only. own: what is sold instead.
    """

    def __init__(self, settings: ShopConfig, own: Goods | None = None):
        # Trap: one generator draws everything, so a draw moved or left out gives another shop.
        self.rng, self.seed = np.random.default_rng(settings.seed), settings.seed
        goods, self.forms = (read_yaml(f"world/shop_{name}.yaml") for name in ("goods", "forms"))
        self.departments = {department: list(tree["categories"])
                            for department, tree in goods["departments"].items()}
        self.categories = {category: {"many": category, **spec, "department": department}
                           for department, tree in goods["departments"].items()
                           for category, spec in tree["categories"].items()}
        if own:
            self.categories, self.departments = own.categories, {DEPARTMENT: [*own.categories]}
            self.forms, self.policies = own.forms(self.forms), own.policies
        else:
            self.policies = data.read_policies(POLICIES)
        self.own, self.products = own, own.products if own else self._catalogue(goods)
        self._money = functools.partial(
            money, next((p.currency for p in self.products if p.currency), CURRENCY))
        self.by_category = {c: [p for p in self.products if p.category[0] == c and p.in_stock]
                            for c in self.categories}
        self.truth = Truth({"dialogues": {}})
        self.log, self.test = self._benchmark(settings.contexts)

    def write(self, folder: str | Path) -> None:
        folder = Path(folder)
        data.write_dialogues(folder / "dialogues.jsonl", self.log)
        data.write_dialogues(folder / "evaluation.jsonl", self.test)
        write_json(folder / "truth" / "shop.json", {"dialogues": self.truth.dialogues})
        if self.own:
            return  # their files are there; of real goods nobody knows a suggestion's quality
        data.write_catalogue(folder / "catalogue.jsonl", self.products)
        write_text(folder / "policies.yaml", POLICIES.read_text(encoding="utf-8"))
        cases = [case._asdict() | {"dialogue": case.dialogue.model_dump(mode="json")}
                 for case in self.cases(500)]
        write_json(folder / "truth" / "cases.json", cases)

    _pick = Dialogues._pick  # by self.rng

    # ---------------------------------------------------------------------------- the catalogue

    def _catalogue(self, goods: dict) -> list[data.Product]:
        products, series = [], goods["series"]
        for department, tree in goods["departments"].items():
            tiers = {brand: float(self.rng.uniform(0.75, 1.4)) for brand in tree["brands"]}
            for category, spec in tree["categories"].items():
                # Not every brand makes everything.
                brands = self.rng.permutation(tree["brands"])[:6].tolist()
                names = [f"{brand} {one} {number}" for brand in brands for one in series
                         for number in (100, 200, 300, 500, 700)]
                for name in self.rng.choice(names, PER_CATEGORY, replace=False).tolist():
                    brand = next(brand for brand in brands if name.startswith(brand))
                    products.append(data.Product(
                        id=f"p{len(products)}", name=name, brand=brand, currency=CURRENCY,
                        category=[category, department], attributes=self._attributes(spec),
                        price=self._price(*spec["price"], tiers[brand]),
                        stock=int(self._pick([0, *range(1, 60)], [6] + [1] * 59))))
        return products

    def _price(self, low: float, high: float, tier: float) -> float:
        """Between low and high, more of them cheap; of a dear brand higher; ends in .00 or .99."""
        share = min(1.0, self.rng.beta(1.6, 2.6) * tier)
        return float(round(low * (high / low) ** share)) - self._pick([0, 0.01])

    def _attributes(self, spec: dict) -> dict:
        yes_no = {name: bool(self.rng.random() < 0.5) for name in spec["yes_no"]}
        yes_no[self._pick(list(yes_no))] = True  # something speaks for every product
        numbers = {name: self._pick(values) for name, (_, _, values) in spec["number"].items()}
        return {**yes_no, **numbers,
                **{name: self._pick(values) for name, values in spec["choice"].items()}}

    # ------------------------------------------------------------------------------ the contexts

    def context(self, intent: str, part: str) -> Context:
        """A shopper's context in "log" or "held_out" forms."""
        turns, about = [], self._pick(list(self.categories))
        for _ in range(self._pick([0, 1, 2], EXCHANGES)):
            # Half of what was said before is about the same category.
            before = about if self.rng.random() < 0.5 else self._pick(list(self.categories))
            turns.append(self._exchange(self._pick(INTENTS), part, before)[0])
        exchange, category, product, asked = self._exchange(intent, part, about)
        if self.rng.random() < NOISE:
            text = self._pick(self.forms["noise"]).format(
                one=self.categories[self._pick(list(self.categories))]["one"],
                brand=self._pick(self.products).brand or "")
            exchange = (text, exchange[1])
        return Context(intent, [*turns, exchange], category, product, asked)

    def _exchange(self, intent: str, part: str, category: str):
        """((user, assistant), category, product, what was asked)."""
        product = self._pick(self.by_category[category])
        slots = self._slots(category, product) | {"model": product.name}
        answers, asked = self.forms["answers"], ("", "")
        if intent == "small talk":
            user = f"{self._pick(self.forms['greetings'])} " + self._pick(
                self.forms["small_talk"][part]).format(day=self._pick(self.forms["days"]))
            return (user, self._pick(answers["small_talk"])), None, None, asked
        if intent == "platform QA":
            policy = self._pick(self.policies)
            q = self._pick(self.forms["policies"][policy.id][part])
            user = self._pick(self.forms["platform"][part]).format(
                q=q, q_low=q if q.startswith("I ") else q[0].lower() + q[1:],
                day=self._pick(self.forms["days"]), **slots)
            reply = self._pick(answers["platform"]).format(text=policy.text)
            return (user, reply), None, product, ("policy", policy.id)
        if intent == "product recommendation":
            shown = self.by_category[category]
            prices = sorted(p.price for p in shown)
            models = {f"model{i}": self._pick(shown).name for i in (2, 3)}
            user = self._pick(self.forms["recommendation"][part]).format(**slots)
            reply = self._pick(answers["recommendation"]).format(
                n=len(shown), low=self._money(prices[0]), high=self._money(prices[-1]),
                **slots | models)
            return (_upper(user) if self.rng.random() < 0.7 else user, reply), category, None, asked
        spec = self.categories[category]
        names = {"feature": told(spec, "yes_no", product),
                 "number": told(spec, "number", product), "price": ["price"]}
        what = self._pick([what for what in names if names[what]])
        name = self._pick(names[what]) if what != "price" else "price"
        slots |= self._named(spec, product, name)
        user = self._pick(self.forms["product"][what][part]).format(**slots)
        reply = what if what != "feature" else "has" if product.attributes[name] else "lacks"
        slots["price"] = self._money(product.price)
        return (user, self._pick(answers[reply]).format(**slots)), category, product, (what, name)

    def _slots(self, category: str, product: data.Product, fresh=lambda name: True) -> dict:
        """What forms may say of a category, all of it true of one product in stock."""
        spec = self.categories[category]
        one, others = spec["one"], [self.categories[c]["many"] for c in self.departments[
            spec["department"]] if c != category]
        slots = {"many": spec["many"], "one": one, "brand": product.brand or "",
                 "model": product.name,
                 "a_one": spec.get("a_one", f"{'an' if one[0] in 'aeiou' else 'a'} {one}"),
                 "price": self._money(ceiling(product.price), self._pick([0, 1, 2])),
                 "usage": self._pick(self.forms["usages"][spec["department"]]),
                 "other": self._pick(others) if others else ""}
        if choices := told(spec, "choice", product):
            choice = self._pick(choices)
            called = spec.get("called", {}).get(choice)
            value = product.attributes[choice]
            slots["choice"] = {"named": f"{called} {value}"} if called else {"value": value}
        # A form that needs what is not told is left out.
        slots = {name: said for name, said in slots.items() if said}
        names = [n for n in spec["yes_no"] if product.attributes.get(n) and fresh(n)]
        numbers = [name for name in told(spec, "number", product) if fresh(name)]
        for pool in (names, numbers):
            slots |= self._named(spec, product, self._pick(pool)) if pool else {}
        return slots

    @staticmethod
    def _named(spec: dict, product: data.Product, name: str, times: int = 1) -> dict:
        if name in spec["yes_no"]:
            return {"feature": spec["yes_no"][name]}
        if name not in told(spec, "number", product):
            return {}
        attr, unit, _ = spec["number"][name]
        return {"attr": attr, "value": f"{product.attributes[name] * times:g} {unit}"}

    # --------------------------------------------------------------------------- the suggestions

    def suggestion(self, kind: str, context: Context, part: str) -> str | None:
        """A suggestion of this kind in this context; None if it cannot be made."""
        good, bad, impossible = (self.forms[name] for name in ("good", "bad", "impossible"))
        category = context.category or self._pick(list(self.categories))
        department = self.categories[category]["department"]
        form_kind = kind
        if kind == "off topic":
            others = [c for c, spec in self.categories.items() if spec["department"] != department]
            if not others:
                return None  # all is one subject
            category = self._pick(others)
            form_kind = self._pick(["brand", "price", "feature"])
        elif kind in ("policy", "policy aside"):
            ids = [p.id for p in self.policies]
            name = self._pick([name for name in ids if name != context.asked[1]] or ids)
            return self._pick(self.forms["policies"][name][part])
        elif kind == "repetition":
            return self._repetition(context, part)
        product = self._pick(self.by_category[category])
        if kind == "attribute" or (context.product and "{model}" in str(bad.get(kind))):
            product = context.product
            category = product.category[0]
        slots = self._slots(category, product, lambda name: name != context.asked[1])
        if kind == "choice":
            slots.pop("value", None)
            slots |= slots.get("choice", {})
        elif kind == "impossible price":
            low = min(p.price for p in self.by_category[category])
            amount = max(1, round(low * self.rng.uniform(0.02, 0.4)))
            form_kind, slots["price"] = "price", self._money(amount, self._pick([0, 1, 2]))
        elif kind == "impossible number":
            spec, form_kind = self.categories[category], "number"
            if not (numbers := told(spec, "number", product)):
                return None
            slots |= self._named(spec, product, self._pick(numbers), 40)
        elif kind == "unknown brand":
            form_kind, slots["brand"] = "brand", self._pick(impossible["brands"][part])
        elif kind == "brand without it":
            sold = {p.brand for p in self.by_category[category]}
            brands = sorted({p.brand for p in self.products if p.brand} - sold)
            if not brands:
                return None
            form_kind, slots["brand"] = "brand", self._pick(brands)
        elif kind == "impossible feature":
            cannot, cannots = self._pick(impossible["cannot"][part])
            slots |= {"cannot": cannot, "cannots": cannots,
                      "magic": self._pick(impossible["magic"][part])}
        if kind == "usage" and slots["usage"] in context.turns[-1][0]:
            return None  # nothing new
        forms = (good.get(form_kind) or bad[form_kind])[part]
        fitting = [form for form in forms if set(re.findall(r"{(\w+)}", form)) <= slots.keys()]
        return _upper(self._pick(fitting).format(**slots)) if fitting else None

    def _repetition(self, context: Context, part: str) -> str:
        """The last query again, word for word or in other words."""
        said, (what, name) = context.turns[-1][0], context.asked
        if self.rng.random() < 0.3:
            return said
        if what == "policy":
            return self._pick(self.forms["policies"][name][part])
        if not context.product:
            slots = self._slots(context.category, self._pick(self.by_category[context.category]))
            return _upper(self._pick(self.forms["bad"]["repetition"][part]).format(**slots))
        spec = self.categories[context.category]
        slots = {"model": context.product.name, **self._named(spec, context.product, name)}
        return _upper(self._pick(self.forms["product"][what][part]).format(**slots))

    def _kinds(self, intent: str) -> dict[str, float]:
        return {name: kind.weight for name, kind in KINDS.items() if intent in kind.intents}

    def _suggestions(self, context: Context) -> list[tuple[str, str]]:
        """Three different (kind, text) by the prompted writer, who sees the context only."""
        kinds, result = self._kinds(context.intent), {}
        while len(result) < 3:
            kind = self._pick(kinds)
            if text := self.suggestion(kind, context, "log"):
                result.setdefault(text, kind)
        return [(kind, text) for text, kind in result.items()]

    def cases(self, number: int) -> list[Case]:
        """Suggestions, half of them good, the kinds in turn; drawn apart from the benchmark."""
        self.rng = np.random.default_rng([self.seed, 1])
        parts = ["log"] if self.seed >= 100 else ["log", "held_out"]
        halves = [[name for name, kind in KINDS.items() if (kind.quality == GOOD) is good]
                  for good in (True, False)]
        result = []
        while len(result) < number:
            i, part = len(result), parts[len(result) // 2 % len(parts)]
            kind = halves[i % 2][i // (2 * len(parts)) % len(halves[i % 2])]
            context = self.context(self._pick(KINDS[kind].intents), part)
            text = None if fault(context.turns[-1][0]) else self.suggestion(kind, context, part)
            if text:
                row = self._dialogue(f"case{i}", context, START)
                result.append(Case(row, text, kind, KINDS[kind].quality, part))
        return result

    # ----------------------------------------------------------------------------- the benchmark

    def _benchmark(self, contexts: int) -> tuple[list[data.Dialogue], list[data.Dialogue]]:
        """(log in time order, test), each balanced over intents, in the paper's proportions."""
        whole, seen, rows = sum(PARTS.values()), set(), {part: [] for part in PARTS}
        for i, intent in enumerate(INTENTS, 1):
            places = {part: round(contexts * n / whole * i / 4) for part, n in PARTS.items()}
            grams = []  # of this intent's test queries
            for _ in range(TRIES * sum(places.values())):  # a small shop has little to say
                if all(len(rows[part]) >= places[part] for part in PARTS):
                    break
                test = len(rows["test"]) < places["test"]
                context = self.context(intent, "held_out" if test else "log")
                said = " / ".join(user.lower() for user, _ in context.turns)
                if said in seen or fault(context.turns[-1][0]):
                    continue
                words = words_of(context.turns[-1][0])
                if test and any(garm.ngram_overlap(words, other) > NEAR for other in grams):
                    continue
                row = self._placed(context, "test" if test else "")
                part = "test" if test else "clicked" if row.clicked else "unclicked"
                if len(rows[part]) >= places[part]:
                    continue
                rows[part].append(row)
                seen.add(said)
                grams += [words] * test
        log = sorted([*rows["clicked"], *rows["unclicked"]], key=lambda row: row.timestamp)
        drafts, self.truth.dialogues = self.truth.dialogues, {}
        for letter, part in (("s", log), ("t", rows["test"])):
            for i, row in enumerate(part):
                self.truth.dialogues[f"{letter}{i}"] = drafts[row.dialogue_id]
                part[i] = row.model_copy(update={"dialogue_id": f"{letter}{i}"})
        return log, rows["test"]

    def _placed(self, context: Context, part: str) -> data.Dialogue:
        """The context as a row of the log with suggestions and clicks, or of the test set."""
        name = f"draft{len(self.truth.dialogues)}"
        shown = [] if part == "test" else self._suggestions(context)
        self.truth.dialogues[name] = {
            "intent": context.intent, "category": context.category or "",
            "eagerness": float(self.rng.normal(0, 0.6)), "needs": self._needs(context),
            "asked": context.turns[-1][0], "kinds": [kind for kind, _ in shown]}
        texts = [text for _, text in shown]
        chances = self.truth.click_probabilities(name, texts)
        clicked = np.flatnonzero(self.rng.random(len(texts)) < chances).tolist()
        hours = float(self.rng.uniform(0, 24 * 28))
        row = self._dialogue(name, context, START + timedelta(seconds=int(hours * 3600)))
        return row.model_copy(update={"suggestions": texts, "clicked": clicked})

    def _needs(self, context: Context) -> list[dict]:
        """What the shopper would like to ask next, as words by which it is recognised."""
        good = [kind for kind in self._kinds(context.intent) if KINDS[kind].quality == GOOD]
        needs = []
        for weight in NEEDS:
            text = None
            while not text:
                text = self.suggestion(self._pick(good), context, "log")
            money_words = {"euros"} if re.search("€|euro|EUR", text) else set()
            topic = stems(context.category or "")
            needs.append({"weight": weight, "words": sorted((stems(text) - topic) | money_words)})
        return needs

    def _dialogue(self, name: str, context: Context, when: datetime) -> data.Dialogue:
        turns = [data.Turn(role=role, content=text) for pair in context.turns
                 for role, text in zip(("user", "assistant"), pair, strict=True)]
        profile = {"country": self._pick(["Germany", "Austria", "France", "Italy", "Spain"]),
                   "customer since": str(self._pick(range(2021, 2027)))}
        return data.Dialogue(
            dialogue_id=name, user_id=f"b{self.rng.integers(1, 10_000)}", timestamp=when,
            profile=profile, intent=context.intent, turns=turns, suggestions=[], clicked=[],
            unsafe=False)
