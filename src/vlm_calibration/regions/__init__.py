"""Where the key object is: regions and their masks."""
