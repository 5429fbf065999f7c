"""The LightningModules of SFT, DPO, evaluation, level fitting and region extraction, with the code that only they need."""
