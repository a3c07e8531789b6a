"""Run a model without torch and transformers: numpy, tokenizers, jinja2 and the C kernels.

`load` opens a file; `model.NativeModel` reads prompts and writes tokens, several texts at a time.
"""
