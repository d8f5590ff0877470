"""What every kernel is launched, checked and built with."""
