"""Sources of queries, images and regions: one class a format."""
