"""Several tokens for one pass: drafters guess what follows, one pass over all weights verifies; only speed changes."""
