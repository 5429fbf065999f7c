"""Key object regions: describe the objects of a query, detect them, and segment them into masks."""
