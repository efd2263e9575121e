"""What every quantized bundle is asked: short questions of several kinds. Calibration uses none of them."""

__all__ = ["QUESTIONS"]

# Of the first one that the model says anything to, the answers are shown to people.
QUESTIONS = (
    "What makes a good neighbour?",
    "Give me three tips for packing a small suitcase.",
    "Write two sentences about a market on a rainy morning.",
    "A train leaves at 9:40 and arrives at 11:15. How long does the journey take?",
    "Write a Python function that tells whether a year is a leap year.",
    "Show a shell command that lists the ten largest files of a folder.",
    "Give the capitals of Italy, Japan and Kenya as a JSON object.",
    "¿Qué diferencia hay entre un río y un lago?",
    "Comment prépare-t-on une soupe de légumes ?",
    "Wozu braucht ein Boot ein Ruder?",
)
