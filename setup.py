"""`pip install .` ends here: there is no package to install, and an empty one would look installed."""

raise SystemExit("Nothing to install: pip install -r requirements.txt, then run DenseCLIP in its folder (README.md)")
