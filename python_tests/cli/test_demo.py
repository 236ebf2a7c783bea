"""The bundled model solves held-out items; how close its river stays to the backbone: test_cache.py."""

import subprocess
import sys

import river_ext
from river_ext.demo_tasks import generator


def test_it_solves_held_out_problems_and_functions():
    model = river_ext.load()
    problems = generator.held_out_problems(16, seed=7)
    functions = generator.held_out_functions(8, seed=7)
    texts = []
    for items in (problems[:8], problems[8:], functions):
        prompts = [item.prompt for item in items]
        texts += [o.text for o in model.generate(prompts, mode="full", max_new_tokens=120)]
    solved = sum(map(generator.score_problem, texts[:16], problems))
    written = sum(map(generator.score_function, texts[16:], functions))
    assert solved >= 12 and written >= 5, f"{solved} of 16 problems, {written} of 8 functions"


def test_the_tasks_are_imported_by_those_who_ask_for_them():
    code = (
        "import sys, river_ext, river_cli.generate, river_cli.evaluate; river_ext.load(); "
        "print(*(name for name in sys.modules if 'demo' in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
