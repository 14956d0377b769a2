"""A shop's own catalogue and policies as the simulated shop (shop.py) sells them; how it puts them.

    python train.py --config configs/qualeqs.yaml data.catalogue=FILE data.policies=FILE

Who has a catalogue and policies but no log of a chat yet trains on simulated shoppers of these very
goods. What shop_goods.yaml tells of made-up goods is read off the rows here: what a category is
called, which of its attributes are numbers, yes or no, or words; and off the policies what people
may ask. Answers and products are the catalogue's; wants and clicks are made up (shop_clicks.py).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import data
from roles.catalogue import parts_of

CURRENCY = "EUR"  # of the made-up goods
UNITS = {"cm": "cm", "mm": "mm", "m": "m", "kg": "kg", "g": "grams", "l": "litres", "ml": "ml",
         "w": "watts", "h": "hours", "min": "minutes", "gb": "GB", "inch": "inches"}
ALONE = ("color", "colour", "material")  # said without the attribute's name: "in white"
DEPARTMENT = "any"  # the one department


def money(currency: str, amount: float, style: int = 0) -> str:
    text = f"{amount:.2f}".removesuffix(".00")
    sign, name = ("€", "euros") if currency == CURRENCY else (f"{currency} ", currency)
    return (f"{sign}{text}", f"{text} {name}", f"{text} {currency}")[style]


def ceiling(price: float) -> int:
    """A round number just above a price, as people say it."""
    step = 5 if price < 50 else 10 if price < 200 else 50 if price < 1000 else 100
    return step * math.ceil((price + 0.01) / step)


def told(spec: dict, kind: str, product: data.Product) -> list[str]:
    """Attributes of a kind of which the catalogue tells this product's."""
    return [name for name in spec[kind] if name in product.attributes]


class Goods(NamedTuple):
    products: list[data.Product]  # in stock and with a price, under the names that shoppers say
    categories: dict[str, dict]  # as in shop_goods.yaml
    policies: list[data.Policy]

    def forms(self, forms: dict) -> dict:
        """The forms of shop_forms.yaml with questions about these policies, and without brands that
        are sold here among those that are not."""
        # A well-known brand is no fault in a shop that has it.
        sold = {p.brand.casefold() for p in self.products if p.brand}
        brands = {part: [name for name in names if name.casefold() not in sold]
                  for part, names in forms["impossible"]["brands"].items()}
        asked = {p.id: forms["policies"].get(p.id) or {
            part: [form.format(name=name) for name in (p.name, *p.keywords) for form in some]
            for part, some in forms["any policy"].items()} for p in self.policies}
        return forms | {"policies": asked, "impossible": forms["impossible"] | {"brands": brands}}


def goods_of(products: Sequence[data.Product], policies: list[data.Policy]) -> Goods:
    """What shoppers can ask about; a product without a price or in no stock is not talked about."""
    sold = [p for p in products if p.in_stock and p.price is not None]
    if not sold:
        raise data.DataError("data.catalogue: price: no product in stock has one")
    categories: dict[str, dict] = {}
    for product in sold:
        # The first is the narrowest, as the judge takes it.
        spec = categories.setdefault(product.category[0], {
            **_said(product.category[0]), "yes_no": {}, "number": {}, "choice": {}, "called": {},
            "department": DEPARTMENT})
        for name, value in product.attributes.items():
            called, unit = _called(name)
            if isinstance(value, bool):
                spec["yes_no"][name] = name.replace("_", " ")
            elif isinstance(value, int | float):
                spec["number"][name] = [called, UNITS.get(unit, unit), []]
            elif isinstance(value, str):
                spec["choice"][name] = []
                spec["called"][name] = "" if name in ALONE else name.replace("_", " ")
    # "The BILLY" may be a bookcase or a door for one: people say which.
    names = Counter(p.name for p in sold)
    return Goods([p.model_copy(update={"name": _name(p)}) if names[p.name] > 1 else p
                  for p in sold], categories, policies)


def _name(product: data.Product) -> str:
    kind = re.split("[,(]", product.description or "")[0].split()
    kind = kind if len(kind) <= 5 else []  # longer: a sentence about it
    return " ".join([product.name, *(word if word.isupper() else word.lower() for word in kind)])


def _said(category: str) -> dict[str, str]:
    """A category as shoppers name it: of "Bookcases & shelving units" bookcases, and one."""
    parts = parts_of(category)
    # The first plural: "bookcases" of "Bookcases & shelving units".
    many = next((part for part in parts if re.search("[^s]s$", part)), category)
    many = " ".join(word if word.isupper() else word.lower() for word in many.split())
    head, of, rest = many.partition(" of ")
    one = re.sub("ies$", "y", head) if head.endswith("ies") else re.sub(
        "(?<=ss|sh|ch)es$|(?<=x)es$|(?<=[^s])s$", "", head)
    one += of + rest
    # Furniture and clothing are not counted.
    a = "some" if one == many else "an" if one[0] in "aeiouAEIOU" else "a"
    return {"many": many, "one": one, "a_one": f"{a} {one}"}


def _called(name: str) -> tuple[str, str]:
    """An attribute's name without its unit, and the unit: width_cm is the width in cm."""
    called, _, unit = name.rpartition("_")
    return (called.replace("_", " "), unit) if called else (name, "")
