"""A dozen documents for each of five published tasks, in the columns of their datasets.

All are made up here. Odd ones are among them: marks that a task removes, answers of one letter or digit,
braces of templates, letters beyond ASCII, spaces at either end.
"""

from dataclasses import dataclass, field

BOOLQ = [
    ("Tin is a metal. It melts at 232 degrees.", "is tin a metal", 1),
    ("Tin is a metal. It melts at 232 degrees.", "does tin melt at 100 degrees", 0),
    ("The river Oder ends in the Baltic Sea.", "does the oder end in the north sea", 0),
    ("A hexagon has six sides; a square has four.", "does a square have fewer sides than a hexagon", 1),
    ("Whales breathe air -- they are mammals.", "can a whale breathe under water", 0),
    ("São Paulo is larger than Rio de Janeiro.", "is são paulo the larger one", 1),
    ("The shop opens at 9:00 {{ except on Sundays }}.", "is it open at 8 on a monday", 0),
    ("Cork floats on water. Iron does not.", "does cork float", 1),
    ("A year on Mars has 687 days.", "is a year on mars longer than on earth", 1),
    ("Glass is made of sand,\nsoda and lime.", "is glass made from sand", 1),
    ("  Ants have six legs. ", "do ants have eight legs", 0),
    ("The lamp was switched off.", "was the lamp on", 0),
]

HELLASWAG = [
    ("Baking", "A woman pours flour into a bowl. She", "then", "adds an egg.|eats the bowl.|flies.|sings."),
    ("Rowing", "Two men sit in a boat.", "they", "row away.|walk on it.|paint it.|sell the sea."),
    ("Cleaning windows", "[header] How to clean a window [title] Take a cloth. [step] Wet it.", "",
     "[substeps] Wipe it.|Break it.  Twice.|[title] Leave|Wait [maybe] a year."),
    ("Skiing", "A boy stands on a hill.", "he", "skis down.|swims up.|reads hay.|is a hill."),
    ("Juggling", "A man holds three balls.", "the man", "throws one.|melts.|holds none|is a ball."),
    ("Café", "Zoë orders a crêpe.", "she", "eats it.|drives it.|à la carte.|orders {{ none }}."),
    ("Shaving", "He looks into a mirror.", "he", "picks a razor.|plants a tree.|sinks.|boils."),
    ("Surfing", "A wave comes up.", "a surfer", "stands up.|sits down to eat.|digs.|knits."),
    ("Archery", "An archer draws the bow.", "", "The arrow flies.|The bow barks.|It snows.|No."),
    ("Washing dishes", " Plates are in a sink. ", "a girl", "rinses them.|reads them.|[x] eats.|runs."),
    ("Chess", "White moves a pawn.", "black", "answers.|eats a pawn with salt.|leaves.|rains."),
    ("Knitting", "She takes two needles.", "she", "knits a row.|rows a knit.|needs a takes.|."),
]  # fmt: skip

ARC = [
    ("Which of these is a mammal?", "A:whale|B:trout|C:frog|D:crow", "A"),
    ("What do plants take from the air?", "A:iron|B:carbon dioxide|C:sand|D:salt", "B"),
    ("Which one conducts best?", "1:wood|2:glass|3:copper|4:rubber", "3"),
    ("What falls at night in winter?", "A:temperature|B:the sky|C:the sea|D:a mountain|E:the Sun", "A"),
    ("How many legs has a spider?", "A:6|B:8|C:10", "B"),
    ("Ice that gets warm", "A:melts.|B:freezes.|C:burns.|D:rusts.", "A"),
    ("What is {{ H2O }}?", "A:water|B:salt|C:gold|D:air", "A"),
    ("Which star is nearest?", "1:Sirius|2:the Sun|3:Vega|4:Rigel", "2"),
    ("What does a thermometer show?", "A:mass|B:time|C:length|D:temperature", "D"),
    ("Which is no planet?", "A:Mars|B:Venus|C:the Moon|D:Saturn", "C"),
    ("A lever needs a ", "A:fulcrum|B:flame|C:magnet|D:lens", "A"),
    ("Où vivent les poissons ?", "A:l'air|B:l'eau|C:le feu|D:la forêt", "B"),
]

MMLU = [
    ("Where is the tibia?", "the arm|the leg|the skull|the hand", 1),
    ("  How many chambers has the heart?\n", "1|2|3|4", 3),
    ("Which one is a bone?", "femur|biceps|aorta|cornea", 0),
    ("What covers the eye?", "the cochlea|the pleura|the cornea|the meniscus", 2),
    ("Blood leaves the left ventricle through", "the aorta|a vein|the trachea|the colon", 0),
    ("The patella is", "in the knee.|in the wrist.|in the ear.|in the neck.", 0),
    ("What is {{ x }}?", "{{ y }}|a template|nothing|a bone", 1),
    ("Where does insulin come from?", "liver|lung|pancreas|spleen", 2),
    ("Which nerve is for seeing?", "vagus|sciatic|radial|optic", 3),
    ("Où est l'humérus ?", "la jambe|le bras|le pied|le crâne", 1),
    ("Which organ has alveoli?", "kidney|lung|liver|heart", 1),
    ("The smallest bone is", "the stapes.|the ulna.|the ilium.|the sacrum.", 0),
]

MATH = [
    ("What is $1+1$?", "It is $\\boxed{2}$."),
    ("Halve one.", "This is $\\boxed{\\frac{1}{2}}$."),
    ("Solve $x^2 = 9$ with $x > 0$.", "We have $(x-3)(x+3) = 0$, so $x = \\boxed{3}$."),
    ("What is $2^{10}$?", "$2^{10} = 1024$, that is $\\boxed{1,\\!024}$."),
    ("Write $x > 1$ as an interval.", "$\\boxed{(1, \\infty)}$"),
    ("Write {{ 3 + 4 }} as a number.", "$\\boxed{7}$"),
    ("Simplify $\\sqrt{8}$.", "$\\sqrt{8} = \\boxed{2\\sqrt{2}}$."),
    ("What is 25\\% of 80?", "A quarter of 80 is $\\boxed{20}$."),
    ("Name the first prime.\n", "The first prime is \\boxed{2}."),
    ("What is $-3 \\cdot 5$?", "$-3 \\cdot 5 = \\boxed{-15}$."),
    ("Was ist der Umfang eines Kreises mit Radius $r$?", "$\\boxed{2\\pi r}$"),
    ("How much is \\$3 and \\$4?", "Together: $\\boxed{\\$7}$."),
]


def boolq(index: int, passage: str, question: str, label: int) -> dict:
    return {"question": question, "passage": passage, "idx": index, "label": label}


def hellaswag(index: int, activity: str, start: str, rest: str, endings: str) -> dict:
    return {
        "ind": index, "activity_label": activity, "ctx_a": start, "ctx_b": rest, "ctx": f"{start} {rest}",
        "endings": endings.split("|"), "source_id": f"made~{index}", "split": "val",
        "split_type": "indomain", "label": str(index % 4),
    }  # fmt: skip


def arc(index: int, question: str, choices: str, answer: str) -> dict:
    labels, texts = zip(*(choice.split(":", 1) for choice in choices.split("|")), strict=True)
    choices = {"text": list(texts), "label": list(labels)}
    return {"id": f"made_{index}", "question": question, "choices": choices, "answerKey": answer}


def mmlu(index: int, question: str, choices: str, answer: int) -> dict:
    return {"question": question, "subject": "anatomy", "choices": choices.split("|"), "answer": answer}


def math(index: int, problem: str, solution: str) -> dict:
    return {"problem": problem, "level": f"Level {index % 5 + 1}", "type": "Algebra", "solution": solution}


def documents(form, rows: list[tuple]) -> list[dict]:
    return [form(index, *row) for index, row in enumerate(rows)]


@dataclass(frozen=True)
class Published:
    """A task of the harness, where its dataset comes from, and documents of ours for it."""

    task: str
    dataset: tuple[str, str | None]  # what the harness asks `datasets` for
    scored: str  # the split
    documents: list[dict]
    examples: str = "train"  # the split that examples would come from
    labels: dict[str, list[str]] = field(default_factory=dict)  # columns that are class labels


PUBLISHED = {
    one.task: one
    for one in (
        Published("boolq", ("aps/super_glue", "boolq"), "validation", documents(boolq, BOOLQ),
                  labels={"label": ["False", "True"]}),
        Published("hellaswag", ("Rowan/hellaswag", None), "validation", documents(hellaswag, HELLASWAG)),
        Published("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), "test", documents(arc, ARC[:4])),
        Published("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), "test", documents(arc, ARC)),
        Published("mmlu_anatomy", ("cais/mmlu", "anatomy"), "test", documents(mmlu, MMLU), "dev",
                  labels={"answer": ["A", "B", "C", "D"]}),
        Published("minerva_math_algebra", ("EleutherAI/hendrycks_math", "algebra"), "test",
                  documents(math, MATH)),
    )
}  # fmt: skip
