"""The simulated shop: its benchmark's proportions and rules; catalogue and policy files."""

import json
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
import yaml

import data
import garm
from config import ShopConfig
from files import ROOT, read_json
from world import __main__ as command
from world import dialogue_clicks, shop, shop_goods


@pytest.fixture(scope="module")
def made():
    return shop.Shop(ShopConfig(contexts=800, seed=101))


# ------------------------------------------------------------------------------------------ files


def product(number=1, **changes) -> dict:
    return {"id": f"p{number}", "name": "Aria", "category": "kettles", "brand": "B", "price": 9.5,
            "currency": "EUR", "attributes": {"capacity_l": 1.5, "keep_warm": True, "x": None},
            "stock": 3} | changes


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("changes, field", [
    ({"id": ""}, "id"), ({"name": None}, "name"), ({"category": []}, "category"),
    ({"price": -1}, "price"), ({"price": "9"}, "price"), ({"stock": -1}, "stock"),
    ({"attributes": {"a": {"b": 1}}}, "attributes.a"), ({"attributes": [1]}, "attributes"),
    ({"id": "p0"}, "id"), ({"attributes": {"sizes": [1, {}]}}, "attributes.sizes"),
    ({"stock": "many"}, "stock"), ({"stock": 1.5}, "stock"),
    ({"price": math.inf}, "price"), ({"attributes": {"a": math.inf}}, "attributes.a"),
])  # fmt: skip
def test_a_malformed_product_is_refused_by_its_line_and_field(tmp_path, changes, field):
    """One fault for one value, whatever types it may be of."""
    path = write(tmp_path / "c.jsonl", [product(0), product(1) | changes])
    path.write_text(path.read_text().replace("Infinity", "1e999"))  # which is JSON, and no number
    with pytest.raises(data.DataError) as caught:
        data.read_catalogue(path)
    [fault] = str(caught.value).splitlines()
    assert fault.startswith(f"{path}:2: {field}: ")


def test_a_product_reads_back_equal_and_without_what_is_not_told(tmp_path):
    [one] = data.read_catalogue(write(tmp_path / "a.jsonl", [product()]))
    assert one.attributes == {"capacity_l": 1.5, "keep_warm": True} and one.category == ["kettles"]
    assert one.attributes["keep_warm"] is True
    data.write_catalogue(tmp_path / "b.jsonl", [one])
    assert data.read_catalogue(tmp_path / "b.jsonl") == [one]


def test_other_shops_names_of_fields_are_read(tmp_path, capsys):
    row = product() | {"product_id": "7", "categories": ["Tables", "Bar"], "rating": 3}
    for own in (["id", "category"], ["id"], ["category"]):
        some = {key: value for key, value in row.items() if key not in own}
        [one] = data.read_catalogue(write(tmp_path / "a.jsonl", [some]))
        assert one.id == ("7" if "id" in own else "p1")
        assert one.category == (["Tables", "Bar"] if "category" in own else ["kettles"])
        assert "product.rating (1 times)" in capsys.readouterr().err


def test_html_of_a_shops_page_is_read_as_it_shows(tmp_path):
    row = product(name="Tom &amp; Co <b>Rest</b>", category="Chairs &amp; pads",
                  description="Chair,<br/>width < 50 cm &nbsp;<!-- old -->", brand=None, price=None,
                  attributes={"note": "a<br>b", "sizes": ["S&#47;M"], "x": None})
    [one] = data.read_catalogue(write(tmp_path / "a.jsonl", [row]))
    assert (one.name, one.category) == ("Tom & Co Rest", ["Chairs & pads"])
    assert one.description == "Chair, width < 50 cm" and one.price is None
    assert one.attributes == {"note": "a b", "sizes": ["S/M"]}
    (tmp_path / "p.yaml").write_text("a:\n  b: <p>Within 30&nbsp;days.</p>")
    assert data.read_policies(tmp_path / "p.yaml")[0].text == "Within 30 days."


@pytest.mark.parametrize("changes, field", [
    ({"currency": "SAR"}, "currency: not that of the lines above"),  # prices are compared
    ({"name": "<p></p>"}, "name"), ({"price": "1,299.00 EUR"}, "price"), ({"id": "p1"}, "id"),
])  # fmt: skip
def test_what_a_real_catalogue_may_hold_is_refused_by_line_and_field(tmp_path, changes, field):
    rows = [product(1), product(2, currency=None), product(3) | changes]
    with pytest.raises(data.DataError, match=re.escape(f"{tmp_path}/c.jsonl:3: {field}")):
        data.read_catalogue(write(tmp_path / "c.jsonl", rows))


def test_stock_decides_what_is_sold():
    sold = [data.Product(**product(stock=stock)).in_stock for stock in (0, 1, None, False, True)]
    assert sold == [False, True, True, False, True]


POLICIES = [
    ("", "1: file"), ("a: [", "1: line: not YAML"), ("- 1", "1: file"),
    ("a:\n  b: c\n  b: d", "3: a"), ("a:\n  b: c\nd:\n  b: c\na:\n  d: c", "5: file"),
    ("a:\n  b: null", "2: a.b: text"), ("a:\n  b: {text: ~}", "2: a.b: text"),
    ("a:\n  b:\n    keywords: [x]", "3: a.b: text"),
    ("a:\n  b: c\n  d: ''", "3: a.d: text"), ("a:\n  b: [1]", "2: a.b: text"), ("a: b", "1: a"),
    ("a: &a\n  b: c\nd: *a", "3: line: not YAML (an alias"),
    ("a: !!python/object/apply:os.getcwd []", "1: a"),
]  # fmt: skip


@pytest.mark.parametrize("text, fault", POLICIES)
def test_a_malformed_policy_is_refused_by_its_line_and_field(tmp_path, text, fault):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(data.DataError, match=re.escape(f"p.yaml:{fault}")):
        data.read_policies(tmp_path / "p.yaml")


def test_a_policy_file_of_copies_of_copies_costs_nothing(tmp_path):
    """30 kB that would be 1.2 billion keywords."""
    lines = ["a: &a", f"  p: &p {{text: x, keywords: [{', '.join(['k'] * 2000)}]}}",
             *(f"  p{i}: *p" for i in range(2000)), *(f"a{i}: *a" for i in range(300))]
    (tmp_path / "p.yaml").write_text("\n".join(lines))
    with pytest.raises(data.DataError, match=r"p.yaml:3: line: not YAML \(an alias"):
        data.read_policies(tmp_path / "p.yaml")


def test_a_key_that_no_policy_has_is_told(tmp_path, capsys):
    (tmp_path / "p.yaml").write_text("a:\n  b: {text: c, keyword: [d]}")
    assert data.read_policies(tmp_path / "p.yaml")[0].keywords == []
    assert "p.yaml: ignored keys: policy.keyword (1 times)" in capsys.readouterr().err


def test_policies_keep_their_words(tmp_path):
    (tmp_path / "p.yaml").write_text("returns:\n  days: 14\n  fee: {text: no, keywords: [off, 2]}")
    days, fee = data.read_policies(tmp_path / "p.yaml")
    assert (days.id, days.text) == ("returns.days", "14")  # text, as it stands there
    assert (fee.text, fee.keywords) == ("no", ["off", "2"])


@pytest.mark.parametrize("content, place", [
    (None, ""), (b"\xff\xfe\x00", ":1: line"), (b"a:\n  b: caf\xe9\n", ":2: line"),
])
def test_policies_that_cannot_be_read_are_one_line(tmp_path, content, place):
    if content:
        (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(data.DataError, match=f"p.yaml{place}: ") as caught:
        data.read_policies(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- benchmark


def test_the_catalogue_is_large_and_within_its_ranges(made):
    assert len(made.products) >= 2000 and len({p.name for p in made.products}) > 2000
    for one in made.products:
        low, high = made.categories[one.category[0]]["price"]
        assert low - 0.011 <= one.price <= high
        assert any(value is True for value in one.attributes.values())
    assert 0 < sum(not p.in_stock for p in made.products) < 0.2 * len(made.products)


def test_the_benchmark_has_the_papers_proportions_and_balanced_intents(made):
    whole = sum(shop.PARTS.values())
    assert whole == 16949
    clicked = [row for row in made.log if row.clicked]
    assert len(clicked) == round(800 * 5914 / whole)
    assert len(made.log) - len(clicked) == round(800 * 10535 / whole)
    assert len(made.test) == round(800 * 500 / whole)
    for rows in (clicked, made.log, made.test):
        counts = Counter(row.intent for row in rows)
        assert set(counts) == set(shop.INTENTS) and max(counts.values()) - min(counts.values()) <= 2


def test_the_full_size_is_the_papers():
    places = {part: round(16949 * n / sum(shop.PARTS.values())) for part, n in shop.PARTS.items()}
    assert places == shop.PARTS


@pytest.mark.parametrize("query, reason", [
    ("kettle", "fragment"), ("??", "fragment"), ("ok thanks", "fragment"), ("😀😀", "fragment"),
    ("rtgh bvcx kettle", "garbled"), ("Show me kettles", None), ("HDMI cables under €5", None),
])  # fmt: skip
def test_fragments_and_garbled_queries_have_no_place(query, reason):
    assert shop.fault(query) == reason


def test_nothing_repeats_and_test_queries_differ(made):
    rows = [*made.log, *made.test]
    said = [tuple(t.content.lower() for t in row.turns if t.role == "user") for row in rows]
    assert len(set(said)) == len(said)
    assert not any(shop.fault(texts[-1]) for texts in said)
    by_intent = [[dialogue_clicks.words_of(row.turns[-2].content) for row in made.test
                  if row.intent == intent] for intent in shop.INTENTS]
    for queries in by_intent:
        near = [garm.ngram_overlap(a, b) for i, a in enumerate(queries) for b in queries[:i]]
        assert max(near, default=0) <= shop.NEAR


def test_few_clicks_fall_more_on_the_first_slots(made):
    slots = Counter(slot for row in made.log for slot in row.clicked)
    assert slots[0] > slots[1] > slots[2] > 0


def test_held_out_forms_stand_in_no_log(made):
    held = [form for part in made.forms["policies"].values() for form in part["held_out"]]
    said = " ".join(t.content for row in made.log for t in row.turns) + " ".join(
        text for row in made.log for text in row.suggestions)
    assert not [form for form in held if form in said]


def test_good_suggestions_are_true_of_the_catalogue(made):
    """What is said of prices and brands, by the rows of the catalogue alone."""
    for case in made.cases(300):
        if case.kind in ("brand", "brand and price", "price", "impossible price"):
            low = case.suggestion.lower()
            named = [p for p in made.products if p.in_stock and p.category[0] in low
                     and (case.kind.endswith("price") and "brand" not in case.kind
                          or p.brand in case.suggestion)]
            price = re.search(r"€(\d+)|(\d+) (?:euros|EUR)", case.suggestion)
            limit = float(price[1] or price[2]) if price else np.inf
            one = made.categories  # "a kettle": the category by its singular
            if not any(category in low for category in one):
                continue
            assert any(p.price <= limit for p in named) is (case.kind != "impossible price")


def test_truth_knows_wants_and_what_attracts(made):
    name, hidden = next(iter(made.truth.dialogues.items()))
    wanted = " ".join(hidden["needs"][0]["words"]).replace("euros", "€9")
    assert made.truth.usefulness(name, [wanted])[0] > made.truth.usefulness(name, ["Zzz"])[0]
    plain, cheap = made.truth.click_probabilities(name, ["Any mice"] ), (
        made.truth.click_probabilities(name, ["Cheaper mice"]))
    assert cheap[0] > plain[0]  # clicked, though no more useful
    assert np.allclose(*(made.truth.usefulness(name, [t]) for t in ("Any mice", "Cheaper mice")))
    visits, messages = made.truth.chats(name, [wanted, "Zzz", "Cheaper mice"])
    assert 0 < visits < 1 and messages > visits


def test_the_command_writes_the_same_bytes_that_read_back(tmp_path, monkeypatch, capsys):
    for folder in ("a", "b"):
        words = ["shop", "--contexts", "120", "--seed", "103", "--out", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", ["world", *words])
        command.main()
    a, b = (sorted(p for p in (tmp_path / f).rglob("*") if p.is_file()) for f in ("a", "b"))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b] and len(a) == 6
    assert "2520 products, 18 policies; 117 contexts" in capsys.readouterr().out
    log = data.read_dialogues(tmp_path / "a" / "dialogues.jsonl")
    test = data.read_dialogues(tmp_path / "a" / "evaluation.jsonl")
    assert log and test and not any(row.suggestions for row in test)
    assert len(data.read_catalogue(tmp_path / "a" / "catalogue.jsonl")) == 2520
    assert len(data.read_policies(tmp_path / "a" / "policies.yaml")) == 18
    assert shop.load_truth(tmp_path / "a").dialogues.keys() == {
        row.dialogue_id for row in [*log, *test]}
    assert len(read_json(tmp_path / "a" / "truth" / "cases.json")) == 500
    shown = (tmp_path / "a" / "dialogues.jsonl").read_text()
    assert '"needs"' not in shown and '"kinds"' not in shown


def test_text_forms_stand_nowhere_else():
    """No form of the shop with three words or more is a string of the judge's files."""
    forms = yaml.safe_load((ROOT / "world" / "shop_forms.yaml").read_text("utf-8"))
    elsewhere = "".join((ROOT / "roles" / name).read_text("utf-8")
                        for name in ("quality.py", "quality.yaml", "prompts.yaml")).lower()

    def texts(tree):
        if isinstance(tree, str):
            yield tree
        elif isinstance(tree, dict | list):
            for value in tree.values() if isinstance(tree, dict) else tree:
                yield from texts(value)

    assert [t for t in texts(forms) if len(t.split()) > 3 and t.lower() in elsewhere] == []


# ------------------------------------------------------------------------------ one's own catalogue


def own_goods(**changes):
    """Rows as real catalogues have them: a name twice, no price, nothing in stock, no numbers."""
    rows = [("Bar furniture", "MOLN", "Bar stool with backrest, 63 cm", 70.0, 3),
            ("Bar furniture", "MOLN", "Bar table", 300.0, None),
            ("TV & media furniture", "RAND", None, 450.0, None), ("Benches", "LAV", None, 90.0, 1),
            ("Benches", "SKY", None, None, 1), ("Boxes of oak", "UTE", None, 20.0, 0)]
    products = [data.Product(
        id=str(i), name=name, category=[category], description=text, price=price, currency="SAR",
        stock=stock, attributes={"width_cm": 40.0 + i, "designer": "Eva Lind", "colour": "white",
                                 "foldable": i % 2 == 0} if i < 2 else {})
        for i, (category, name, text, price, stock) in enumerate(rows)]
    policies = [data.Policy(section="returns", name="window", text="Within 30 days.",
                            keywords=["sending back"])]
    return shop_goods.goods_of([p.model_copy(update=changes) for p in products], policies)


def test_goods_are_called_as_people_call_them():
    own = own_goods()
    assert [p.name for p in own.products] == [
        "MOLN bar stool with backrest", "MOLN bar table", "RAND", "LAV"]
    assert {c: (spec["many"], spec["a_one"]) for c, spec in own.categories.items()} == {
        "Bar furniture": ("bar furniture", "some bar furniture"),
        "TV & media furniture": ("TV & media furniture", "some TV & media furniture"),
        "Benches": ("benches", "a bench")}
    said = shop_goods._said
    assert said("Chests of drawers & units")["a_one"] == "a chest of drawers"
    assert said("TV & media furniture") == {"many": "TV & media furniture",
                                            "one": "TV & media furniture",
                                            "a_one": "some TV & media furniture"}
    assert said("Armchairs")["a_one"] == "an armchair" and said("Bodies")["one"] == "body"


def test_simulated_shoppers_talk_of_ones_own_goods_alone(tmp_path):
    one = shop.Shop(ShopConfig(contexts=160, seed=101), own_goods())
    said = [turn.content for row in [*one.log, *one.test] for turn in row.turns]
    text = "\n".join(said)
    assert "MOLN bar table" in text and "SAR" in text and "€" not in text.replace("€ ", "")
    assert not re.search(r"SKY|UTE|kettles|None|Brenwick", text)  # no price, no stock; not sold
    shown = "\n".join(s for row in one.log for s in row.suggestions)
    assert "designer Eva Lind" in shown and "white bar furniture" in shown and "None" not in shown
    assert "window" in text and "sending back" in shown
    one.write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "dialogues.jsonl", "evaluation.jsonl", "truth"}  # catalogue and policies are the owner's


def test_brands_that_are_sold_are_not_among_the_unknown():
    forms = own_goods(brand="Sony").forms(
        yaml.safe_load((ROOT / "world" / "shop_forms.yaml").read_text("utf-8")))
    assert "Sony" not in forms["impossible"]["brands"]["log"]
    assert "Bosch" in forms["impossible"]["brands"]["log"]
    assert forms["policies"]["returns.window"]["log"][0] == "What is your policy on window?"


def test_a_catalogue_without_a_price_is_refused_in_a_line():
    with pytest.raises(data.DataError, match="price: no product in stock has one"):
        own_goods(price=None)
