"""Data: records and their sources, pictures, tokenizer, templates, batches, mixtures."""
