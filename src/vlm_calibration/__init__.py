"""Train vision-language models to state honest confidence."""
