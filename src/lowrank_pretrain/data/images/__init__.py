"""Read images: arrays, files, named data sets."""
