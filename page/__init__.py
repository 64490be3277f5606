"""A page that dehazes photographs in a browser, without a network: `python -m page`, or `make page`."""
