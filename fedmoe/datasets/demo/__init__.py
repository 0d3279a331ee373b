"""The data sets of the demonstration, made from installed packages."""
