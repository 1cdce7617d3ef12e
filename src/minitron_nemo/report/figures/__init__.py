"""The report's pictures: NumPy in, inline SVG out; one module a picture."""
