"""Numbers in words: counts, bytes, shares and times short enough for a table."""


def count(value: float) -> str:
    """Return a count with three digits and a unit: 812, 3.15 M, 7.24 G."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit * 0.9995:  # what would be rounded up to the next unit is written in it
            return _three_digits(value / limit) + unit
    return f"{value:.0f}"


def size(nbytes: float) -> str:
    """Return a number of bytes in decimal units: 812 B, 6.65 MB."""
    short = count(nbytes)
    return f"{short}B" if " " in short else f"{short} B"


def share(value: float) -> str:
    """Return a share in per cent, with one decimal."""
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Return a time: 0.8 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def loss(value: float) -> str:
    """Return a predicted loss with four decimals, or three digits below them; a dash where nothing is lost."""
    return "-" if value == 0 else f"{value:.3g}" if abs(value) < 0.001 else f"{value:.4f}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
