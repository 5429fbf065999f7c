"""Models behind an OpenAI-compatible address: requests that survive faults, and answers rated like those of a model in this process."""
