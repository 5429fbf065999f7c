"""The LightningModules: what a training or evaluation step is, on top of pure models, losses and metrics."""
