"""All decoder layers in one operation, for a CPU."""
