"""Vision-language models: loading, adapters, shared forward passes, generation, export, and memory estimates."""
