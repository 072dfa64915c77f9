"""Run directories -> PNGs and one HTML page that opens without a network (`build.build`)."""
