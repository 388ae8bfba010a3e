"""From YAML files and command-line overrides to one typed object, through Hydra. Imports no torch."""
