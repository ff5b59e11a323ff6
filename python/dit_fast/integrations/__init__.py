"""Recorders for training loops that are not the user's own: `transformers` (Hugging Face) and `lightning`.

Each module needs its library, `pip install 'dit_fast[integrations]'`, and is imported by its own name.
"""
