"""From a request to tokens.

engine.py takes checked requests (request.py) through prefill.py and then, as members of a batch (batch.py),
through steps (decoder.py) or lossless cycles (lossless.py). What these read, write and capture is in
graph.py; sampling.py draws at their ends; network.py calls the ops. generate.py has the callers.
"""
