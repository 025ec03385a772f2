"""What decides which weights a token needs, and how that is fitted to samples."""
