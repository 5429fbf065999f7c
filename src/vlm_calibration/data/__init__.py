"""From files to batches: sources, on-the-fly region noise, collators and the LightningDataModule."""
