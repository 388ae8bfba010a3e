"""The commands of `mlite`: parse, build, call, report."""
