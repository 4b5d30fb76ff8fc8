"""Speed and memory, measured: one command each, JSON results with device, versions and commit (see NOTES.md)."""
