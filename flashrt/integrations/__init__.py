"""Other libraries' interfaces to an engine. Each is imported by who uses that library."""
