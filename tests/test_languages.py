"""roles/languages.py: which language a text is in, and which a person writes."""

import itertools
import json

import pytest

from files import ROOT
from roles.languages import language
from roles.text import majority_language


@pytest.mark.parametrize(
    "text, expected",
    [
        ("How do tides work?", "en"),
        ("如何学习Python", "zh"),
        ("比较Kyoto和Osaka", "zh"),
        ("使用 iPhone and a Mac with it", "en"),
        ("Как работает iPhone?", "ru"),
        ("¿Qué es café?", "es"),
        ("Wie lerne ich Gitarre?", "de"),
        ("Is Cien años de soledad worth reading?", "en"),  # a question about a title
        ("La La Land vs Moulin Rouge", "en"),  # capitals are names
        ("Monday.com broke again scheduling: Monday.com", "en"),  # "com" is no word of it
        ("tasks on und.das.de and info@como.per.it", "en"),
        ("chords of una, una by una", "en"),  # one word again and again is a name
        ("El Niño", "en"),
        ("São Paulo nightlife", "en"),
        ("Recetas de cocina japonesa", "es"),  # titles: few function words
        ("Rutas de senderismo", "es"),
        ("Vins de la Loire", "es"),  # or French: no English at any rate
        ("東京の桜の名所を教えて", "ja"),
        ("京都旅行の計画", "ja"),  # one character of kana is enough
        ("「ありがとう」怎么用", "zh"),  # but in a Chinese question
        ("英会話", "ja"),  # no other set has 会 and 話
        ("駅前再開発", "ja"),
        ("日本料理", "zh"),
        ("鬼滅の刃什么时候更新", "zh"),
        ("《ワンピース》剧情分析", "zh"),
        ("서울에서 맛집 추천", "ko"),
        ("Docker 배포", "ko"),  # beside a name
        ("Kubernetes Helm ArgoCD 정리", "ko"),
        ("Настройка Nginx", "ru"),
        ("iPhone Pro Max обзор", "ru"),
        ("What does 사랑 mean", "en"),
        ("Meaning of the word дача", "en"),
        ("مرحبا", "other"),
        ("2 + 2 = ?", "other"),
        ("", "other"),
    ],
)
def test_language(text, expected):
    assert language(text) == expected


@pytest.mark.parametrize("expected, titles", [
    ("es", "Clases de inglés en línea|Alquilar un piso en Madrid|Poda de rosales|Cuidado de gatos"),
    ("de", "Wohnung in Berlin mieten|Hochzeit planen|Hühner halten|Kleine Geschichte der Hanse"),
    ("fr", "Films de Truffaut|Tailler les rosiers|Déclaration de revenus|Randonnées en Corse"),
    ("pt", "Alugar apartamento em Lisboa|Declaração de imposto|Criar galinhas|Vinhos do Douro"),
    ("it", "Film di Fellini|Storia di Roma|Dichiarazione dei redditi|Piante nella casa"),
    ("en", "Tour de France 2024|São Paulo nightlife|La La Land review|Jalapeño recipes"),
    ("en", "Camino de Santiago|leonardo da vinci from scratch|Rabbit hole: Moog Grandmother"),
    # Without a small word: by the letters of most.
    ("de", "Sauerteig Rezept|Gartenarbeit Kalender|Umzug Checkliste|Klavier Noten"),
    ("de", "Fahrradtour Donau|Sauerteig Rezept|Docker Swarm|Mietrecht Nebenkosten"),
    ("es", "Cocina mexicana|presupuesto familiar|novela negra|Museos Madrid"),
    ("fr", "Randonnée Alpes|révolution française|Recette ratatouille"),
    ("en", "Docker Swarm|El Niño winters|Gödel incompleteness|Barcelona tapas|Notion Calendar"),
    ("en", "Monsta X|Rebecca du Maurier|Rebecca du Maurier|Lyrebird"),
    ("en", "Ibn Battuta|Steam Deck|fridtjof nansen trivia"),
    ("en", "Squier Affinity|Formlabs"),
    ("en", "Foo \ud800 bar|Bazar\nBaz"),
    ("en", "La Casa de Papel|El Camino de Santiago|Simone de Beauvoir|Leonardo da Vinci"),
])
def test_titles_tell_their_language_together(expected, titles):
    """One alone may be a name; English is not what their person writes."""
    titles = titles.split("|")
    assert majority_language(titles) == expected
    for title in titles:
        assert language(title, expected) == expected


def test_of_twenty_histories_of_short_titles_nineteen_are_told():
    histories = {
        "de": "Hefezopf backen|Rückenschmerzen Büro|Fotobuch gestalten;Hamburg "
              "Hafen|Modelleisenbahn Spur N|Excel Tabellen;Wärmepumpe Altbau|Katzenfutter "
              "Test|Italienisch Vokabeln;Gitarre stimmen|Kompost anlegen|Bahnreise "
              "Prag;Schwäbische Spätzle|Kant Pflichtethik|Tennis Aufschlag;Elternzeit "
              "Antrag|Laufschuhe Dämpfung|Weihnachtsmarkt Nürnberg;Handball Training|Aquarium "
              "einrichten|Vogelstimmen",
        "es": "Paella valenciana|Alquiler piso Valencia|Ajedrez tácticas;Huerto urbano|Camino "
              "Santiago etapas|Guitarra flamenca;Fútbol sala|Inglés básico|Cine argentino;Novelas "
              "negras|Yoga embarazo|Impuestos autónomos;Perros adopción|Pan casero|Senderismo "
              "Pirineos;Trenes Japón|Poesía Lorca|Excel fórmulas;Acuarelas paisajes|Economía "
              "doméstica|Bicicleta montaña",
        "fr": "Tarte tatin|Grammaire allemande|Vélo électrique;Château Loire|Jardin balcon|Roman "
              "policier;Pain levain|Marathon Paris|Budget étudiant;Cinéma italien|Aquarelle "
              "paysage|Chien adoption;Tricot débutant|Voyage Japon|Fiscalité auto-entrepreneur;"
              "Photographie animalière|Fromage chèvre|Histoire médiévale"}
    told = [majority_language(titles.split("|")) == expected
            for expected, some in histories.items() for titles in some.split(";")]
    assert (sum(told), len(told)) == (19, 20)


@pytest.mark.parametrize("expected, titles", [
    ("en", "Is Cien años de soledad worth reading?|How to reread Dune|Amélie"),
    ("en", "Does La vita è bella stay a film che fa piangere?|Amélie|Dune"),
    ("es", "How to learn React|Vinos de la Rioja|Museos en Madrid|Poda con tijeras"),
])
def test_one_long_title_in_a_question_outweighs_no_others(expected, titles):
    for order in itertools.permutations(titles.split("|")):
        assert majority_language(order) == expected


@pytest.mark.parametrize("expected, titles", [
    ("ja", "日本料理|京都|北海道のラーメン"), ("ja", "京都|日本料理|ラーメン|桜の名所|Python"),
    ("zh", "三体|京都|火锅做法|北海道のラーメン"), ("zh", "量子計算|宋朝|臺灣美食|東京の桜"),
    ("zh", "京都|日本料理"), ("ko", "漢字|論語|한국 역사"), ("zh", "三体|京都|방탄소년단 콘서트"),
    ("en", "Dune novels|京都|Elden Ring|日本料理|Chess"),
    ("ja", "家計簿|確定申告|料理教室|大阪|Excelの使い方"),
    ("ja", "囲碁入門|沖縄旅行|転職活動|ラーメン"),
    ("zh", "の字的用法|宋朝|汉语语法|红楼梦"), ("zh", "學習英文|台北旅遊|履歷撰寫|東京の桜"),
    ("ko", "Docker 배포|Notion 템플릿|GCP 요금"), ("ru", "Ошибки Git|Docker образы|Linux"),
])
def test_characters_alone_are_of_whoever_writes_the_rest_in_kana_or_hangul(expected, titles):
    assert majority_language(titles.split("|")) == expected


def test_no_real_english_summary_is_taken_for_another_language():
    corpus = (ROOT / "configs" / "teacher_corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for row in corpus for text in json.loads(row)["starters"]]
    assert {*map(language, texts)} == {"en", "zh"} and len(texts) > 1000
