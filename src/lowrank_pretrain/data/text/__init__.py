"""Read text: token files, streamed documents, tokenizers."""
