"""The stages of `mlite prepare`, one file each."""
