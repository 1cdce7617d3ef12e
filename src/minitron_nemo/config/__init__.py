"""One plain dataclass for each group of keys: field, unit, range and source. No torch, no files."""
