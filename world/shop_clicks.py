"""What the simulated shop hides: what its shoppers want to ask next, and what gets clicked.

    truth = shop.load_truth("DIR")
    truth.click_probabilities("s17", ["Kettles under €40", "Are there cheaper kettles?"])   # (K,)
    truth.chats("s17", [...])   # (P(somebody goes on chatting), expected messages): ChatUV, ChatPV

Departure: it stands in for the live shoppers of QualEQS (section 4.2.2, appendix F). Any text is
judged, whoever wrote it, by its words alone. A click depends on what is wanted and on what
attracts; whether the chat goes on after it, on what is wanted only: clicks do not tell what is
useful. It knows nothing of the quality judge. Only what evaluates may read it.

Legend: K suggestions of a context.
"""

import numpy as np

from files import read_yaml
from world.click_model import EXAMINATION
from world.dialogue_clicks import fitness, liking, stems, words_of

ON_TOPIC = 0.2  # use of a suggestion that names the category but meets no need
NOISE = 0.04  # of looks at a suggestion end in a click or not for no reason
LONGER = 2.0  # further messages of a chat that meets the best need


class Truth:
    """dialogues: id -> {"intent", "category", "eagerness": logit of its user, "asked": the last
    query, "needs": [{"weight", "words": stems}], best first}."""

    def __init__(self, state: dict):
        self.dialogues = state["dialogues"]

    def usefulness(self, dialogue_id: str, suggestions: list[str]) -> np.ndarray:
        """(K,) in [0, 1]: how far each suggestion asks what its shopper wants to know next."""
        hidden, result = self.dialogues[dialogue_id], []
        asked, topic = stems(hidden["asked"]), stems(hidden["category"])
        for text in suggestions:
            words = stems(text) | ({"euros"} if "€" in text or "EUR" in text else set())
            shares = [need["weight"] * len(words & set(need["words"])) / len(need["words"])
                      for need in hidden["needs"] if need["words"]]
            use = max([ON_TOPIC * bool(topic & words), *shares])
            result.append(use * fitness(text) * (0.2 if words <= asked else 1.0))
        return np.array(result)

    def click_probabilities(self, dialogue_id: str, suggestions: list[str]) -> np.ndarray:
        """(K,) P(click) of each suggestion, with slot bias."""
        hidden, result = self.dialogues[dialogue_id], []
        useful = self.usefulness(dialogue_id, suggestions)
        attractive = read_yaml("world/shop_forms.yaml")["attractive"]  # word -> logits
        for slot, (text, use) in enumerate(zip(suggestions, useful, strict=True)):
            pull = sum(attractive.get(word, 0.0) for word in set(words_of(text)))
            logit = (-3.0 + 2.6 * use + pull + 0.5 * liking(text, 0)
                     - 1.5 * (fitness(text) == 0) + hidden["eagerness"])
            chance = (1 - NOISE) / (1 + np.exp(-logit)) + NOISE * 0.1
            result.append(EXAMINATION[min(slot, len(EXAMINATION) - 1)] * chance)
        return np.array(result)

    def chats(self, dialogue_id: str, suggestions: list[str]) -> tuple[float, float]:
        """(P(the shopper sends a message), expected messages) after these suggestions."""
        chances = self.click_probabilities(dialogue_id, suggestions)
        useful = self.usefulness(dialogue_id, suggestions)
        visits = 1 - float(np.prod(1 - chances))
        return visits, float((chances * (1 + LONGER * useful)).sum())
