"""Small documents in the form of published data sets, odd ones among them."""

import json
from pathlib import Path

GSM8K = [
    ("Ana has 3 coins and finds 4. How many has she?", "She has 3 + 4 = <<3+4=7>>7 coins.\n#### 7"),
    (
        "A house costs $80,000 and rises by 150%. What is the profit?",
        "It is $<<80000*1.5=120000>>120,000.\n#### 120,000",
    ),
    ("It was 2 degrees; it fell by 7. What is it?", "2 - 7 = -5\n#### -5"),
    ("Écrit en français: combien font 2 fois 1,5 ?", "2 * 1.5 = 3\n#### 3"),
    ("What is {{ 7 * 7 }} and {% raw %}?", "It is 49.\n#### 49"),
    ("  Spaces before, and a newline after\n", "#### 12 "),
    ("How much is half a dollar?", "Half of $1 is $.50\n#### .50"),
]

HUMANEVAL = {
    "task_id": "Made/0",
    "prompt": 'def add(a, b):\n    """Their sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
}

BOOLQ = [
    {
        "passage": f"There are {n} birds in the tree.",
        "question": "are there birds in the tree",
        "label": n % 2,
    }
    for n in range(4)
]

MATH = [
    {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "Level 1", "type": "Algebra"},
    {"problem": "Half?", "solution": "$\\boxed{\\frac{1}{2}}$", "level": "Level 2", "type": "Precalculus"},
]


def write_lines(path: Path, documents: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def write_gsm8k(data: Path) -> Path:
    """Seven documents to draw examples from, and the same seven, turned round, to answer."""
    documents = [{"question": question, "answer": answer} for question, answer in GSM8K]
    write_lines(data / "gsm8k" / "train.jsonl", documents)
    write_lines(data / "gsm8k" / "test.jsonl", documents[::-1])
    return data
