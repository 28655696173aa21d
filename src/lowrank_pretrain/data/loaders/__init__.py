"""Load batches, and go on in the middle of an epoch."""
