"""How much the runtime feeds a graph at once; engines are built for no more."""

__all__ = ["CAPACITY_STEP", "MOST_ALTERNATIVES", "MOST_ROWS", "PREFILL_CHUNK", "TILES_PER_RUN"]

# The cache has a multiple of so many positions, so that similar prompts share one allocation.
CAPACITY_STEP = 256
# A longer prompt is fed in pieces, so that attention scores stay small; shorter ones run in one piece.
PREFILL_CHUNK = 1024
# More tiles in one run of the vision encoder only need more memory.
TILES_PER_RUN = 4
# Rows of a step that checks guesses: the last token's, and one for each guessed token.
MOST_ROWS = 16
# Of tokens that are told beside the one that was chosen.
MOST_ALTERNATIVES = 100
