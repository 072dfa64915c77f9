"""Report of run directories as PNGs and one self-contained HTML page (`build.build`)."""
