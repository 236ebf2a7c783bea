"""The text that the bundled model was trained on, and the held-out items that it is asked. No model needs it.

generator.py draws items, of word_problems.py and functions.py; interpreter.py scores functions but runs no
code. The model itself is in demo/.
"""
