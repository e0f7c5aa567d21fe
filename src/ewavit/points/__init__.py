"""Point clouds: operations, the point transformer and data sets. Needs the extra `ewavit[points]`."""
