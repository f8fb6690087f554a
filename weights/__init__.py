"""Public weight files, read directly: layouts, tables, catalogue, hub."""
