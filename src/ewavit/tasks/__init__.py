"""What a run learns: the interface `Task`, and one file per task."""
