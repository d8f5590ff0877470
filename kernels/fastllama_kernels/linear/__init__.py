"""Matrix times a few vectors, and what stands around it."""
