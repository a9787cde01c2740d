"""Speed and memory of etastar, each beside a named reference: `etastar bench --help`."""
