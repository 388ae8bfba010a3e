"""Token files, their blend and the loader: the order of all samples is a pure function of config and seed."""
