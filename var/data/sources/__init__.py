"""One adapter per data set: records in, rows out."""
