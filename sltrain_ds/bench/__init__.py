"""Side-by-side measurements in one process: medians of paired ratios, written as Markdown and JSON."""
