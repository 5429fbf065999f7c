"""From records on disk to batches: sources, on-the-fly region noise, collators and the LightningDataModule."""
