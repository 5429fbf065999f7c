"""Vision-language models: loading, adapters, forwards that compute only what is needed, and generation."""
