"""The page that ``loadgen report`` makes: one file, drawn here as SVG, nothing fetched from anywhere."""
