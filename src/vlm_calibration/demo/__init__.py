"""The embedded demo: scenes drawn from OpenMoji glyphs, questions about them, and a tiny VLM trained on them."""
