"""The least squares of surgery: a linear refitted to fewer inputs, and which of them it can best do without."""
