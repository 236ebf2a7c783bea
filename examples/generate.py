"""Text from the bundled model, and how deep its tokens went. For yours: load("path/to/hf-checkpoint")."""

import river_ext

model = river_ext.load()
prompt = (
    "Question: Ana has 21 coins and Ben has 12 more than Ana. How many coins do they have together?\nAnswer:"
)
for piece in model.stream(prompt, threshold=0.9):
    print(piece.text, end="", flush=True)

full = model.generate(prompt, mode="full")
river = model.generate(prompt, threshold=0.9)
depth = sum(river.exit_depths) / len(river.exit_depths)
print(f"\n{len(river.tokens)} tokens at a mean depth of {depth:.1f}; full depth says {full.text.strip()!r}")
