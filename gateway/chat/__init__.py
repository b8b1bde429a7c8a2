"""Language: text in, text out, and between the two token ids that prefill and decode instances compute."""
