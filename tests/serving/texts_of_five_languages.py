"""A hundred texts in five languages: English from the data folder, the others written here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

FRENCH = (
    "Le chat dort sur le vieux canapé près de la fenêtre.",
    "Où avez-vous appris à cuisiner d'aussi bons plats ?",
    "Il pleut depuis ce matin, et le marché est presque vide.",
    "L'été dernier, nous avons traversé les Alpes à vélo.",
    "« Je n'en sais rien », répondit-elle en haussant les épaules.",
)
GERMAN = (
    "Der Zug nach München fährt heute eine Viertelstunde später ab.",
    "Könnten Sie mir bitte das Salz reichen?",
    "Über den Wäldern lag dichter Nebel, als wir aufbrachen.",
    "Die Donaudampfschifffahrtsgesellschaft besaß früher viele Schiffe.",
    "Straßenbahnen kosten 2,80 € – außer für Schüler.",
)
RUSSIAN = (
    "Сегодня утром в парке было очень тихо.",
    "Мы долго ждали автобус, но он так и не приехал.",
    "Она читала письмо медленно, строчка за строчкой.",
    "Сколько стоит билет до Петербурга на завтра?",
    "В 1961 году человек впервые увидел Землю из космоса.",
)
CHINESE = (
    "今天天气很好，我们去公园散步吧。",
    "这本书讲的是一个小镇上的故事。",
    "请问最近的地铁站在哪里？",
    "他每天早上六点起床，然后喝一杯绿茶。",
    "2024年的春节在二月十日🎉。",
)
ODD = (
    "",
    " ",
    "\n\n\n",
    "a  b   c\t\td",
    "100000 3.14159 1e-10",
    "don't can't WE'LL I'm",
    "🚀🦙👩‍👩‍👧",
    "x = {'a': [1, 2]}  # ok\n",
)


def texts(data: Path) -> list[str]:
    """Each sentence of the four languages alone and after another, odd ones, and English to make a hundred."""
    own = [*FRENCH, *GERMAN, *RUSSIAN, *CHINESE]
    both = [f"{first} {second}" for first, second in itertools.pairwise(own)]
    lines = (data / "c4" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    found = [*own, *both, *ODD]
    return [*found, *(json.loads(line)["text"][:600] for line in lines[: 100 - len(found)])]
