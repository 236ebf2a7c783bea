"""The quality gate: full depth in bf16 is about as near to `transformers` in fp32 as `transformers` in bf16.

On a fixed text, token by token: the mean KL(transformers fp32 || ours) in nats, and by how much the negative
log-likelihood of the text differs. What is fast but computes something else does not pass: the gate is tried
on the river, whose 4 bits cost more than rounding does.
"""

import pytest
import torch
from tiny_model import demo_model

import river_ext
from river_ext.evaluation.measure import kl_divergence

TIMES = 2  # the KL of transformers in bf16: rounding is chance, and differs between instruction sets
MOST_NATS = 0.01  # that the mean negative log-likelihood may be off
DEMO_TEXT = (
    "Question: Uma has 100 cakes and Gus has 32 more than Uma. How many cakes do they have together?\n"
    "Answer: 100 + 32 = 132. 100 + 132 = 232. #### 232"
)
REAL_TEXT = """The lighthouse stood at the end of a long spit of sand, and for sixty years nobody had lived in
it. When the storms came in autumn, the waves reached the door, and in the morning the steps were green with
weed. Children from the village said that a light still burned at the top on certain nights. Their
grandparents, who had once lit it themselves, said nothing at all.

Question: A farmer has 17 sheep and buys 8 more. Then 5 run away. How many are left?
Answer: 17 + 8 = 25, and 25 - 5 = 20.

def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""


class Gate:
    """`transformers` on a text, in fp32 and in bf16."""

    def __init__(self, model, text: str):
        self.tokens = model.text.encode(text)
        self.exact, self.rounded = (self._logits(model.directory, d) for d in (torch.float32, torch.bfloat16))

    def _logits(self, directory, dtype) -> torch.Tensor:
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        with torch.inference_mode():
            return model(torch.tensor([self.tokens])).logits[0, :-1].float()

    def kl(self, logits) -> float:
        return kl_divergence(self.exact, logits).mean().item()

    def nll(self, logits) -> float:
        return torch.nn.functional.cross_entropy(logits, torch.tensor(self.tokens[1:])).item()

    def passes(self, logits) -> bool:
        near = self.kl(logits) <= TIMES * self.kl(self.rounded)
        return near and abs(self.nll(logits) - self.nll(self.exact)) <= MOST_NATS


def check(model, text: str) -> None:
    gate = Gate(model, text)
    assert model.network.dtype == torch.bfloat16
    for by in ("steps", "prefill"):
        logits = model.score(gate.tokens, prompt_length=1, by=by, mode="full").logits
        assert gate.passes(logits), f"KL {gate.kl(logits)} against {gate.kl(gate.rounded)}"
    river = model.score(gate.tokens, prompt_length=1, mode="full_w4").logits
    assert not gate.passes(river)


def test_the_demo_passes():
    check(demo_model(), DEMO_TEXT)


def test_a_trained_model_passes(real_model):
    check(river_ext.load(real_model), REAL_TEXT)
