"""The sample corpus: a small multilingual text and code corpus made of what the installed packages ship."""
