"""The method: what a reviewer reads. It imports torch and the standard library only."""
