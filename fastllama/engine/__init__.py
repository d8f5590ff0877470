"""Fixed memory and compiled steps: knows rows, knows no policy."""
