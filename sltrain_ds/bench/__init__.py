"""Side-by-side measurements in one process: medians of paired ratios, Markdown and JSON out."""
