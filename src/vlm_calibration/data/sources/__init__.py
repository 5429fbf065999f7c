"""Where queries, images and regions come from. Each source is one class with two methods."""
