"""The diaphane command."""
