"""Other projects' models: read from their files and written to them. One name map a family, used in both directions."""
