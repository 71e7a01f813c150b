"""Sources of targets: a built-in name, a Hugging Face folder or id, or a GGUF file."""
