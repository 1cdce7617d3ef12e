"""Text in, tokens out: corpora, token files, documents, tokenizers, calibration, questions, stored samples."""
