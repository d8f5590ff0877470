"""Adapters to other libraries, which are imported only by the module named after them."""
