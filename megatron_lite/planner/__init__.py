"""What a training costs before it runs: work, traffic and time of a layout on a type of GPU. Needs no GPU and no memory."""
