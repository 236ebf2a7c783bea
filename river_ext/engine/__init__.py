"""From a request to tokens.

generate.py takes a request through prefill.py and the steps of decoder.py; sampling.py draws at their ends. A
step is in step.py or, captured, in graph.py; network.py calls the ops for both.
"""
