"""The parts an LLM plays in the paper, by rule: teacher, matcher, judge and summariser; and the
parser and filters that every list of starters passes through, whoever wrote it.

    python -c "import roles; print(roles.key_phrases('Where to start with Baldur\'s Gate 3?'))"

Departure: the paper prompts large models for these roles. Rules need no network, give the same
answer each time and can be read; each class can be replaced by one with the same method.
E earlier and L later summaries, D embedding.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch

from data import Message, language
from llm import Parsed, clean_starter, format_starters, parse_starters  # noqa: F401

Encode = Callable[[list[str]], torch.Tensor]  # n texts -> (n, D), unit rows

# ------------------------------------------------------------------------------------ key phrases

_TOKEN = re.compile(r"\w+(?:['\-./]\w+)*(?:\+\+|#)?")
_INSIDE = frozenset("of the and no de la du von van".split())  # kept between two capitalised words
_STOP = frozenset("""
a about above achieve achieved add adding advice affect affects after again against all allow
allowed allows also am an and another any anyone anything apply applying approach are aren't around
as ask asking assign at attend attending available avoid avoiding background be became because
become becomes been before begin behind being best better between both bring build building built
but buy buying by calculate called came can can't cannot change changed changes choose choosing come
comes compare compared comparing consider considered contain contains convince correct correctly
could cover create creating deal dealing decide decrease define defined demonstrate demonstrating
describe detail details determine did didn't differ difference different discover discovering
discuss discussing do does doesn't doing don't drink drinking during each eat eating effective
either encourage end enjoy ever every everything exist explain explained explaining explanation feel
feels few find follow for from gain get getting give given go going good great grow growing grown
had handle happen happens hard has have having he help helping her here him his how i i'd i'll i'm
i've if implement implementing improve improving in include increase increases increasing instead
into introduce introduction involving is isn't it it's its just keep keeping know knowing learn
learned learning let like long look looking lose made make makes making many matter may me mean
means measure measuring might more most mostly motivate motivated much must my need needed needs new
not now obtain of off on one's only or other our out over own people perceive perform please popular
possible possibly prepare prevent prove provide proving put quick quickly read really recent
recommend recommendation recommendations recommended reduce refer remove replace replaced represent
require required run safe same say search see set she should show side similar simple simplest
simply since so solve solving some someone something somewhere stand start started starting still
stop store storing strong such suggest suggestion suggestions take taken taking talk taught teach
teaches teaching tell terrible than that that's the their them then there these they thing things
think this those thoughts through to today told too towards transition translate try trying turn
understand understanding understood up us use used useful uses using various versus very vs w want
was way ways we well were what what's when where which while who whose why will with within without
won't work working works worth would write writing you your
""".split())
_OPENERS = frozenset(["the", "new"])  # with a capital they begin a name, also at the start of a text
_LY_NOUNS = frozenset("ally anomaly assembly bully butterfly dragonfly family fly jelly lily".split())
_MATHS = re.compile(r"\$[^$]*\$|\\\w+")
_GENERIC = frozenset("""
app art article basics beer beginner beginners book books business check class code coffee common
computer course cooking data day days design education example examples exercise fact facts family
film fitness fix food fun game games gift group guide health history hobby home idea ideas
information job language level life list love man math mathematics method mistakes money month movie
movies music news number numbers overview part person place plan problem problems programming
project question questions reading review science service short show software sport sports story
student students study system teacher teaching technology test time tips tool tools topic topics
travel trip tutorial type types
video weekend word words world year years 音乐 旅游 旅行 美食 电影 游戏 运动 学习 工作 生活 健康 小说 新手 入门 技巧 攻略 指南 方法 问题 推荐
教程 知识 建议 计划 周末 朋友 时间 东西 科技 历史 文化
""".split())
_FUNCTIONAL_EN = frozenset("""
translate translation translating translator convert converting conversion rewrite rewriting
rephrase paraphrase proofread proofreading summarise summarize summary summarising summarizing email
emails e-mail resume cv spreadsheet spreadsheets excel regex format formatting grammar spelling
letter pdf calculate invoice debug debugging template memo
""".split())
_FUNCTIONAL_ZH = re.compile("翻译|转换|改写|润色|校对|总结|摘要|邮件|简历|表格|格式|正则|文案|报告")
_CHORE_EN = re.compile(  # work to be done on something of one's own, in whatever field
    r"^(?:please |can you |could you )?(?:fix|check|correct|polish|shorten|tidy|solve|sort out) "
    r"(?:my|this|these|the)\b|\bfor me$", re.IGNORECASE)
_REQUEST_ZH = re.compile(
    "有什么|有哪些|是什么|为什么|什么是|怎么样|怎么办|怎么|怎样|如何|什么|哪些|哪个好|哪个|哪里|请问|请|推荐|类似|学习"
    "|了解|介绍|解释|帮助|帮我|给我|告诉我|一下|一个|一些|想要|想|需要|可以|能不能|可不可以|适合|关于|比较|对比"
    "|区别|入门|技巧|攻略|好在|最好|好用|问题|处理|检查|我们|我|你|吗|呢|吧|啊|了|(?<!目)的|以及|还是"
    "|和(?![平谐服牛])|与|(?<!现)在(?!线)")
_QUOTED = re.compile(r"[\"“「《]([^\"“”「」《》]{2,60})[\"”」》]")


def _words(text: str) -> list[str]:
    return [t.casefold() for t in _TOKEN.findall(text.replace("’", "'"))]


def normal_form(text: str) -> str:
    """Text without case and punctuation, for telling duplicates."""
    return " ".join(_words(unicodedata.normalize("NFKC", text)))


def is_functional(text: str) -> bool:
    """A chore (translate, rewrite, e-mail, ...) rather than an interest."""
    return bool(_FUNCTIONAL_ZH.search(text) or _CHORE_EN.search(text.strip(" .!?"))) or (
        not _FUNCTIONAL_EN.isdisjoint(_words(text)))


def chores(texts: Iterable[str]) -> np.ndarray:
    """Boolean, one a text: is_functional."""
    return np.array([is_functional(text) for text in texts], bool)


def _specific(phrase: str) -> bool:
    words = [w for w in _words(phrase) if w not in _STOP and w not in _FUNCTIONAL_EN]
    plain = all(w in _GENERIC or w.isdigit() or len(w) < 2 for w in words)
    return not plain and not _FUNCTIONAL_ZH.fullmatch(phrase)


def _runs(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """(capitalised names, content words between stop words) as runs of tokens, in order."""
    names, contents, name, content = [], [], [], []
    end, first = 0, True
    later = _TOKEN.findall(text)[1:]
    titled = sum(t[0].isupper() and t.casefold() in _STOP for t in later) > 2 and not any(
        t.islower() and len(t) > 3 for t in later)  # a Title in Which Nearly All Is Capital

    def close(run, runs):
        while run and run[-1].casefold() in _INSIDE | _STOP:
            run.pop()
        if run:
            runs.append(run[:])
        run.clear()

    for match in _TOKEN.finditer(text):
        token, gap = match[0], text[end:match.start()]
        low, end = token.casefold(), match.end()
        if gap.strip():
            close(name, names)
            close(content, contents)
            first = first or any(c in ".?!:;\n" for c in gap)
        stop = low in _STOP or (low.endswith("ly") and token == low and low not in _LY_NOUNS)
        marked = token[1:] != token[1:].lower() or (
            not token.isdigit() and any(c.isdigit() for c in token))
        inner = not titled and not first and len(token) > 1  # "A" and "I" tell nothing
        named = not stop or inner or low in _OPENERS or (name and low in _INSIDE)
        if marked or (token[0].isupper() and named):
            # A capital alone, at the start of a sentence, is no evidence: `?` until more follows.
            name.append(("?" if first and not marked else "") + token)
        elif name and (token.isdigit() or low in _INSIDE):
            name.append(token)
        else:
            close(name, names)
        if stop:
            close(content, contents)
        else:
            content.append(token)
        first = False
    close(name, names)
    close(content, contents)
    names = [[t.lstrip("?") for t in run] for run in names if run[0][0] != "?" or len(run) > 1]
    return names, contents


@lru_cache(maxsize=100_000)
def _key_phrases(text: str) -> tuple[str, ...]:
    text = _MATHS.sub(" , ", unicodedata.normalize("NFKC", text[:2000]).replace("’", "'"))
    found = [q.strip() for q in _QUOTED.findall(text)]
    if language(text) == "zh":
        parts = re.findall(r"[㐀-鿿\w·+#\- ]+", _REQUEST_ZH.sub("\n", _QUOTED.sub("\n", text)))
        parts = [p.strip(" -·") for p in parts]
        found += sorted((p for p in parts if len(p) > 1), key=len, reverse=True)
    else:
        names, contents = _runs(_QUOTED.sub(" , ", text))
        found += [" ".join(r) for runs in (names, contents) for r in sorted(runs, key=len)[::-1]]
    kept: dict[str, str] = {}
    for phrase in found:
        low = phrase.casefold()
        if _specific(phrase) and not any(f" {low} " in f" {other} " for other in kept):
            kept[low] = phrase
    return tuple(kept.values())


def key_phrases(text: str) -> list[str]:
    """Specific subjects of a text, most specific first: quoted, names, then runs of content words."""
    return list(_key_phrases(text))


def grounded(starter: str, interests: Sequence[str]) -> bool:
    """Whether it names, whole, a subject of an interest, or none has one: small models garble names."""
    subjects = {x.lower() for i in interests for y in key_phrases(i) for x in (y, *y.split(" and "))}
    text = unicodedata.normalize("NFKC", starter).replace("’", "'").lower()
    return not subjects or any(x in text for x in subjects)


# ---------------------------------------------------------------------------------------- filters

_UNSUITABLE = {
    "medical": (r"""symptoms?|diagnos\w+|medications?|dosages?|prescriptions?|antidepressants?|tumou?rs?|
        cancers?|chemotherapy|diabetes|hiv|std|disease|surgery|depression|bipolar|schizophrenia|
        pregnan\w+|miscarriage|infertility|anorexia|bulimia|therapist|insulin|antibiotics?""",
        "症状|诊断|药物|吃药|用药|剂量|处方|癌|肿瘤|糖尿病|艾滋|抑郁|手术|怀孕|流产|疾病|治疗|高血压"),
    "sensitive": (r"""suicid\w+|self-harm|porn\w*|nudes?|sex|sexual\w*|erotic\w*|rape|abortion|cocaine|
        heroin|meth|terroris\w+|genocide|bomb-making|racis\w+|nazis?|massacre|murder someone|gambling""",
        "自杀|自残|色情|裸照|性爱|强奸|堕胎|毒品|恐怖袭击|恐怖主义|屠杀|赌博|种族歧视"),
    "invasive": (r"""(?:your|my|his|her|their) (?:ex|salary|debts?|divorce|affair|password|home address|
        |weight|income|sexuality|religion)|passwords?|social security|credit card numbers?|
        passport numbers?|spy on|stalk(?:ing)?|cheating (?:wife|husband|partner)""",
        "密码|身份证|银行卡号|家庭住址|你的工资|你的收入|前任|前男友|前女友|出轨|离婚|跟踪某人|偷拍")}


def _any_of(words: str) -> str:
    return "|".join(filter(None, (w.strip() for w in words.replace("\n", "|").split("|"))))


_UNSUITABLE = {kind: re.compile(rf"(?<!\w)(?:{_any_of(en)})(?!\w)|{zh}", re.IGNORECASE)
               for kind, (en, zh) in _UNSUITABLE.items()}


def is_unsuitable(text: str) -> str | None:
    """'medical', 'sensitive' or 'invasive' by word lists, or None. Cautious: a list is no judgement."""
    return next((kind for kind, words in _UNSUITABLE.items() if words.search(text)), None)


def _majority_language(interests: Sequence[str]) -> str:
    return Counter(map(language, interests)).most_common(1)[0][0] if interests else "other"


def _fault(starter: str, wanted: str) -> str | None:
    """Why a starter cannot be shown to somebody who reads `wanted`, or None."""
    if language(starter) == "zh":
        bad_length = not 4 <= len("".join(starter.split())) <= 20
    else:
        bad_length = not 2 <= len(starter.split()) <= 12
    if bad_length:
        return "length"
    words = _words(starter)
    if (re.search(r"</?\w|<\||\|>|&&", starter) or not any(c.isalpha() for c in starter)
            or any(unicodedata.category(c) in ("Cc", "Cs") for c in starter)
            or any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))):
        return "malformed"
    if wanted != "other" and language(starter) != wanted:
        return "language"
    return is_unsuitable(starter)


def filter_starters(starters: Iterable[str], interests: Sequence[str], seen: Iterable[str] = (),
                    repeats: bool = False) -> tuple[list[str], Counter]:
    """(starters fit to show, in order; how many fell for which reason).

    Reasons: length, malformed, language (not that of most interests), medical, sensitive, invasive,
    duplicate (of an earlier one or of `seen`, whatever the case and punctuation; not with `repeats`).
    """
    wanted = _majority_language(interests)
    known = set(map(normal_form, seen))
    kept, dropped = [], Counter()
    for starter in starters:
        normal = normal_form(starter)
        reason = _fault(starter, wanted) or (
            "duplicate" if normal in known and not repeats else None)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(starter)
            known.add(normal)
    return kept, dropped

# ---------------------------------------------------------------------------------------- teacher

_KINDS = {kind: re.compile(words, re.IGNORECASE) for kind, words in {
    "music": r"\b(?:music|songs?|albums?|band|guitar|piano|singer|jazz|concert|playlist)\b|音乐|歌|吉他|钢琴",
    "game": r"\b(?:games?|gaming|gameplay|boss|quests?|chess|minecraft|zelda|rpg)\b|游戏|棋|原神|王者",
    "media": r"\b(?:movies?|films?|series|anime|manga|novels?|books?|season|episodes?|show|theories)\b"
             r"|电影|电视剧|动漫|小说|剧|书",
    "place": r"\b(?:travel|trip|visit|city|island|hiking|itinerary|beach|museum)\b|旅|景点|城市|岛|游玩",
    "food": r"\b(?:recipes?|cook\w*|bak\w+|beers?|coffee|wine|tea|bread|brew\w*|drinks?)\b|菜|做饭|烘焙|咖啡|茶|酒",
    "sport": r"\b(?:sports?|football|soccer|basketball|tennis|running|marathon|yoga|climbing|cycling)\b"
             r"|足球|篮球|跑步|瑜伽|网球|健身",
    "tech": r"\b(?:python|software|code|programming|app|ai|llms?|linux|computers?|computing|android)\b"
            r"|编程|软件|电脑|手机|人工智能",
    "science": r"\b(?:physics|quantum|space|biology|chemistry|astronomy|mathematics|calculus|theorem)\b"
               r"|物理|量子|宇宙|化学|生物|数学",
    "craft": r"\b(?:knit\w*|crochet|woodwork\w*|garden\w*|paint\w*|pottery|sew\w*|photography)\b"
             r"|编织|园艺|绘画|手工|摄影|木工"}.items()}

# One line per angle: how to start, compare, surprise, recommend, plan, deep dive, quiz, create,
# origins, what next, mistakes, hidden gems. `kind|kind: template` is for those kinds only.
_TEMPLATES = {"en": """
Where should I start with {x}?; Three easy first steps into {x}; What should newcomers know about {x}?; A five-minute introduction to {x}; game: Best early choices in {x}; tech|craft: A first small project with {x}
What sets {x} apart from its rivals?; Compare {x} with a close alternative; {x} versus the obvious alternative; Which matters most in {x}, and why?; sport: Compare two playing styles in {x}; food: Compare classic and modern takes on {x}
Surprising facts about {x}; What do most people misunderstand about {x}?; A little-known story about {x}; The strangest thing about {x}; science: Which result in {x} surprised experts most?
Recommend something similar to {x}; What else suits fans of {x}?; Best books or videos on {x}; media|music: Build a list for lovers of {x}; food: What goes well with {x}?
Plan a weekend around {x}; Plan a relaxed evening with {x}; A one-week challenge based on {x}; A month of small goals in {x}; place: Plan three unhurried days around {x}; sport: Plan a four-week start in {x}
Go deeper into {x} with me; What makes {x} work so well?; Unpack the big ideas behind {x}; Explain the hardest part of {x}; media: Unpack the hidden themes of {x}; science|tech: How does {x} really work inside?
Quiz me on {x}; Five tricky questions about {x}; Test my knowledge of {x}; True or false: {x} edition; Can you stump me on {x}?
Write a short story inspired by {x}; Design a poster about {x}; Invent a game based on {x}; Turn {x} into a short poem; music|media: Imagine a fresh sequel to {x}; food: Invent a recipe inspired by {x}
How did {x} come about?; The origins of {x} in five moments; Who shaped {x} the most?; How has {x} changed over time?; place: Which past events shaped {x}?
What should I explore after {x}?; What comes next for {x}?; Where is {x} heading in ten years?; Take me one step beyond {x}; game|media: What to try once {x} ends?
Common mistakes to avoid with {x}; Which myths about {x} are false?; What do experts in {x} do differently?; What do beginners overlook in {x}?; craft|food: Why does {x} go wrong, and fixes
Hidden gems for fans of {x}; The most underrated side of {x}; Which corners of {x} deserve attention?; Secrets that insiders know about {x}; place: Quiet corners of {x} most visitors miss; music: Overlooked tracks for fans of {x}
""", "zh": """
{x}从哪里开始最好？; {x}新手第一步做什么？; 五分钟带我认识{x}
{x}和同类相比强在哪？; {x}有什么替代选择？; 对比一下{x}的不同流派
{x}有哪些冷知识？; 大家对{x}有哪些误解？; {x}最让人意外的一点
推荐和{x}类似的内容; 喜欢{x}还会喜欢什么？; media|music: 推荐几部{x}同类佳作
围绕{x}安排一个周末; 用{x}设计一周小挑战; place: 安排三天{x}慢旅行
深入聊聊{x}背后的原理; {x}为什么这么吸引人？; media|game: 聊聊{x}里的隐藏细节
考考我对{x}的了解; 出五道{x}小测验
以{x}为灵感写个故事; 为{x}设计一张海报; food: 用{x}发明一道新菜
{x}是怎么发展起来的？; 谁对{x}影响最大？
了解{x}之后学什么？; {x}的未来会怎样？
{x}最常见的错误有哪些？; {x}高手有什么不同做法？
{x}有哪些被低估的亮点？; {x}的宝藏玩法有哪些？
"""}


def _angles(lang: str) -> list[list[tuple[frozenset[str], str]]]:
    """Angles, each a list of (kinds it is for, empty for all; template)."""
    angles = []
    for line in _TEMPLATES[lang].strip().splitlines():
        pairs = (re.fullmatch(r"(?:([a-z|]+): )?(.+)", item).groups() for item in line.split("; "))
        angles.append([(frozenset((kinds or "").split("|")) - {""}, text) for kinds, text in pairs])
    return angles


def templates(lang: str) -> list[str]:
    """The teacher's questions about {x}, of every angle and kind."""
    return [text for angle in _angles(lang) for _, text in angle]


class RuleTeacher:
    """Writes starters from interests alone: a key phrase of each, in turn, under varied angles."""

    def write(self, interests: list[str], n: int, rng: random.Random) -> str:
        """`<think> .. </think><sug> a && b </sug>` with n starters in the language of most interests.

        Chores come only when nothing else is left. Fewer than n only if no phrase is usable or the
        templates run out.
        """
        wanted = _majority_language(interests)
        subjects = self._subjects([i for i in interests if language(i) == wanted])
        angles = _angles("zh" if wanted == "zh" else "en")
        rng.shuffle(angles)
        for angle in angles:
            rng.shuffle(angle)
        starters: list[str] = []
        while subjects and len(starters) < n:
            written = len(starters)
            for phrases, kind in subjects:
                starter = self._starter(phrases, kind, angles, interests, starters)
                if starter and len(starters) < n:
                    starters.append(starter)
            if len(starters) == written:
                break
        named = ", ".join(phrases[0] for phrases, _ in subjects[:n])
        return f"<think> Interests worth building on: {named or 'none'}. </think>" + (
            format_starters(starters))

    @staticmethod
    def _subjects(interests: list[str]) -> list[tuple[list[str], str]]:
        """(short key phrases, kind) of each usable interest; chores only if there is nothing else."""
        found, known = {False: [], True: []}, set()
        for interest in interests:
            phrases = []
            for phrase in key_phrases(interest):
                phrase = re.sub(r"&{2,}|[<>{}]", " ", phrase)
                zh = language(phrase) == "zh"
                phrase = clean_starter(phrase[:8] if zh else " ".join(phrase.split()[:5]))
                if phrase and len(phrase) <= 60 and normal_form(phrase) not in known:
                    phrases.append(phrase)
            if phrases and not is_unsuitable(interest):
                known.add(normal_form(phrases[0]))
                kind = next((k for k, words in _KINDS.items() if words.search(interest)), "generic")
                found[is_functional(interest)].append((phrases, kind))
        return found[False] or found[True]

    @staticmethod
    def _starter(phrases, kind, angles, interests, starters) -> str | None:
        """The first fitting template under the angle used least recently; it is used up."""
        for phrase in phrases:
            for angle in angles:
                for template in angle:
                    if template[0] and kind not in template[0]:
                        continue
                    starter = template[1].format(x=phrase)
                    if filter_starters([starter], interests, seen=starters)[0]:
                        angle.remove(template)
                        angles.remove(angle)
                        angles.append(angle)
                        return starter
        return None


def covering(starters: list[str], interests: list[str], k: int, encode: Encode) -> list[str]:
    """At most k starters that cover the interests: from each interest in turn its next starter.

    A starter is of the interest that it is nearest to. Order within an interest stays.
    """
    if not starters or not interests:
        return starters[:k]
    owner = _cosines(encode, starters, interests).argmax(1)
    turn = [sum(owner[:i] == o) for i, o in enumerate(owner)]  # how many its interest had before
    order = sorted(range(len(starters)), key=lambda i: (turn[i], owner[i]))
    return [starters[i] for i in order[:k]]


# --------------------------------------------------------------------- matcher, judge, summariser


def _cosines(encode: Encode, a: list[str], b: list[str]) -> np.ndarray:
    return (encode(a) @ encode(b).T).cpu().numpy()  # (len(a), len(b))


def same_text(a: list[str], b: list[str]) -> np.ndarray:
    """Boolean (len(a), len(b)): equal but for case and punctuation."""
    rows, columns = (np.array([normal_form(t) for t in texts]) for texts in (a, b))
    return (rows[:, None] == columns) & (rows[:, None] != "")


def _spans(phrase: str) -> set[str]:
    """Every run of whole words in a phrase; of two or more characters in Chinese."""
    zh = language(phrase) == "zh"
    units = list(phrase) if zh else _words(phrase)
    units, joint = units[:12], "" if zh else " "
    return {joint.join(units[i:j]) for i in range(len(units))
            for j in range(i + 1 + zh, len(units) + 1)}


def _unit(phrase: str) -> str:
    """A phrase as the matcher compares it: lower-case words, or the Chinese text as it is."""
    return phrase.casefold() if language(phrase) == "zh" else " ".join(_words(phrase))


def themes(histories: Iterable[Iterable[str]], share: float) -> set[str]:
    """Phrases that more than `share` of the people (at least five) use: themes, not subjects."""
    people, total = Counter(), 0
    for summaries in histories:
        people.update({_unit(phrase) for text in set(summaries) for phrase in key_phrases(text)})
        total += 1
    return {phrase for phrase, n in people.items() if n > max(5, share * total)}


class RuleMatcher:
    """Do an earlier and a later summary share a specific subject? (The paper asks an LLM.)"""

    def __init__(self, encode: Encode, cosine: float = 0.45, cosine_alone: float = 0.85,
                 themes: Iterable[str] = ()):
        self.encode, self.cosine, self.cosine_alone = encode, cosine, cosine_alone
        self.themes = set(themes)  # a shared theme is not enough

    def match(self, jobs: Sequence[tuple[list[str], list[str]]]) -> list[np.ndarray]:
        """(E, L) of 1 (match) and 0 for each (earlier, later) job."""
        return [self._matches(*job).astype(np.int8) for job in jobs]

    def _matches(self, earlier: list[str], later: list[str]) -> np.ndarray:
        """The same text, a cosine that suffices, or a cosine and a shared phrase; and no chore,
        which may come again and again without being an interest."""
        if not earlier or not later:
            return np.zeros((len(earlier), len(later)), dtype=bool)
        cosine = _cosines(self.encode, earlier, later)  # (E, L)
        shared = self._contained(earlier, later) | self._contained(later, earlier).T
        same = same_text(earlier, later)
        match = same | (cosine >= self.cosine_alone) | (shared & (cosine >= self.cosine))
        return match & ~chores(earlier)[:, None]

    def _contained(self, whole: list[str], parts: list[str]) -> np.ndarray:
        """(len(whole), len(parts)): some key phrase of the whole contains one of the part."""
        where = defaultdict(list)
        for column, text in enumerate(parts):
            for phrase in map(_unit, key_phrases(text)):
                if phrase not in self.themes:
                    where[phrase].append(column)
        found = np.zeros((len(whole), len(parts)), dtype=bool)
        for row, text in enumerate(whole):
            for phrase in key_phrases(text):
                for span in _spans(phrase.casefold()) & where.keys():
                    found[row, where[span]] = True
        return found


class RuleJudge:
    """Which of two lists of interests says more about a user? (The paper asks an LLM.)"""

    def __init__(self, encode: Encode):
        self.encode = encode

    def compare(self, rows: Sequence[tuple[list[str], list[str], list[str]]]) -> list[float]:
        """(history, a, b) -> share won by a: 1.0, 0.5 for a tie, 0.0. Swapping swaps the answer."""
        return [self._compare(*row) for row in rows]

    def _compare(self, history: list[str], a: list[str], b: list[str]) -> float:
        size = max(len(a), len(b))
        gap = self._score(history, a, size) - self._score(history, b, size)
        return 0.5 if abs(gap) < 1e-6 else float(gap > 0)

    def _score(self, history: list[str], interests: list[str], size: int) -> float:
        """Share of specific interests, plus distinct subjects, plus persistence; each in [0, 1]."""
        if not interests:
            return 0.0
        subjects = [key_phrases(i)[0].casefold() for i in interests
                    if key_phrases(i) and not is_functional(i)]
        near = _cosines(self.encode, interests, history) > 0.6 if history else np.zeros((1, 1))
        persistence = np.minimum(near.sum(1), 3).mean() / 3  # three sessions make a lasting interest
        return len(subjects) / len(interests) + len(set(subjects)) / size + float(persistence)


class RuleSummariser:
    """Stands in for a missing summary: the first thing that the user asked."""

    def summarise(self, messages: list[Message] | None) -> str:
        """First sentence of the first user message, at most 12 words or 20 Chinese characters."""
        said = [m for m in messages or () if m.content.strip()]
        said = [m for m in said if m.role == "user"] or said
        if not said:
            return ""
        sentence = re.split(r"(?<=[.?!])\s+|(?<=[。？！])", said[0].content.strip(), maxsplit=1)[0]
        return sentence[:20] if language(sentence) == "zh" else " ".join(sentence.split()[:12])
