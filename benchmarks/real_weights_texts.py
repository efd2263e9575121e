"""Questions of several kinds, made of templates and topics; those of the proof share neither with calibration's."""

import itertools

__all__ = ["calibration_prompts", "held_out_prompts"]

_CHAT = (
    "Why {}?",
    "Explain to a child: why {}?",
    "Give three short reasons why {}.",
    "My friend says that {}. Is that right, and why?",
)
_FACTS = (
    "bread rises in the oven", "the moon changes its shape", "cats purr", "salt melts ice on the road",
    "leaves turn red in autumn", "we yawn when we are tired", "ships made of steel float", "glass breaks so easily",
    "bees build cells with six sides", "the sea tastes of salt", "metal feels colder than wood", "ears pop in a plane",
)  # fmt: skip
_CODE = (
    "Write a Python function that {}.",
    "Write a JavaScript function that {}, with a comment on each line.",
    "Show a unit test for a function that {}.",
)
_TASKS = (
    "reverses the words of a sentence", "counts the vowels in a string", "checks whether a number is prime",
    "merges two sorted lists", "removes duplicates from a list", "reads a CSV file and sums a column",
    "converts Celsius to Fahrenheit", "finds the longest word in a text",
)  # fmt: skip
_JSON = (
    "Return a JSON object that describes {}, with the keys name, price and tags.",
    "List three facts about {} as a JSON array of objects.",
)
_THINGS = (
    "a bicycle",
    "a kitchen knife",
    "a cup of tea",
    "a rain coat",
    "a desk lamp",
    "an apple",
    "a guitar",
    "a tent",
)
_LANGUAGES = (
    "¿Por qué es importante {}?", "Escribe dos frases sobre {}.",
    "Pourquoi faut-il {} ?", "Écris deux phrases sur {}.",
    "Warum sollte man {}?", "Schreibe zwei Sätze über {}.",
)  # fmt: skip
_WORDS = (
    ("dormir bien", "dormir assez", "genug schlafen"),
    ("leer libros", "lire des livres", "Bücher lesen"),
    ("beber agua", "boire de l'eau", "Wasser trinken"),
    ("caminar cada día", "marcher chaque jour", "jeden Tag spazieren gehen"),
)
_HELD_OUT = (
    "Why is the sky blue?",
    "What is the capital of Australia, and what is it known for?",
    "How do airplanes stay in the air?",
    "Tell me a short story about a lighthouse keeper and a whale.",
    "What should I cook tonight with eggs, rice and spinach?",
    "Summarize the plot of Romeo and Juliet in four sentences.",
    "What are the differences between weather and climate?",
    "Give me advice for a job interview at a bank.",
    "How does a refrigerator work?",
    "Write a polite email asking for a refund of a broken kettle.",
    "Name five animals that live in the desert and one fact about each.",
    "Who was Marie Curie?",
    "How can I learn to play chess?",
    "Explain the water cycle.",
    "Write a poem about winter in the mountains.",
    "What is inflation and who is hurt by it?",
    "Write a Python class for a bank account with deposit and withdraw.",
    "Write a SQL query for the ten oldest customers.",
    "Write a bash script that renames all .txt files to .md.",
    "Explain what a hash table is, with an example in Python.",
    "Write a C function that computes the factorial of n.",
    "Fix this code: for i in range(10) print(i)",
    "Write a regular expression that matches a date such as 2024-05-17, and explain it.",
    "Write an HTML page with a heading and a list of three links.",
    "Return the planets of the solar system as JSON with name and number of moons.",
    "Turn this into JSON: Anna, 34, nurse, lives in Lyon; Bob, 51, pilot, lives in Oslo.",
    "Write a JSON schema for an address.",
    "Give me a JSON configuration for a web server with port, host and log level.",
    "¿Cuál es la capital de Perú y qué se puede visitar allí?",
    "Escribe una receta corta de tortilla de patatas.",
    "Explica qué es un volcán.",
    "Cuéntame algo sobre la historia de los trenes.",
    "Quelle est la capitale du Canada et pourquoi ?",
    "Explique comment fonctionne un arc-en-ciel.",
    "Écris une lettre courte à un ami malade.",
    "Raconte une histoire de chat et de souris.",
    "Was ist die Hauptstadt von Österreich und was sieht man dort?",
    "Erkläre, wie ein Fahrrad funktioniert.",
    "Schreibe eine kurze Geschichte über einen Bären.",
    "Nenne drei Tipps für einen Garten.",
    "What is the difference between a virus and a bacterium?",
    "Describe how a letter travels from one country to another.",
    "Compare trains and buses for a journey of 300 kilometres.",
    "How is paper made?",
    "Write a dialogue between a teacher and a pupil about fractions.",
    "What did people eat in ancient Rome?",
    "Write a Rust function that returns the largest number of a slice.",
    "Explain recursion, with an example in JavaScript.",
    "Write a Dockerfile for a small Python web application.",
    "Write a JSON array of five countries with capital, population and language.",
    "Describe a library book as a nested JSON object with author, loans and shelf.",
    "¿Cómo se hace el queso?",
    "Describe una ciudad junto al mar en cinco frases.",
    "Comment fabrique-t-on le chocolat ?",
    "Décris une journée dans une ferme.",
    "Wie entsteht ein Gewitter?",
    "Beschreibe einen Markt in einer kleinen Stadt.",
    "How do I repair a flat tyre on a bicycle?",
    "What happens to food in the stomach?",
    "Write a Go program that prints the Fibonacci numbers.",
)
_QUICK = slice(0, 40, 4)


def calibration_prompts(count: int) -> list[str]:
    """The first `count` of a fixed order in which the kinds take turns; up to 132."""
    kinds = [
        [template.format(fact) for fact in _FACTS for template in _CHAT],
        [template.format(task) for task in _TASKS for template in _CODE],
        [template.format(thing) for thing in _THINGS for template in _JSON],
        [_LANGUAGES[i].format(words[i // 2]) for words in _WORDS for i in range(len(_LANGUAGES))],
        [f"What is {thing} good for?" for thing in _THINGS] + [f"How would you find out whether {f}?" for f in _FACTS],
    ]
    turns = [text for turn in itertools.zip_longest(*map(_stride, kinds)) for text in turn if text is not None]
    return turns[:count]


def held_out_prompts(quick: bool) -> list[str]:
    """All of them, or ten."""
    return list(_HELD_OUT[_QUICK] if quick else _HELD_OUT)


def _stride(texts: list[str]) -> list[str]:
    """Neighbours in a list are alike: take every fifth, then those behind them."""
    return [text for start in range(5) for text in texts[start::5]]
