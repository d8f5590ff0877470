"""The commands of ``fastllama bench``."""
