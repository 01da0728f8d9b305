"""Pixels to files and back, what an image file says of its making, and the preview."""
